-- claim(wm, definitions): take over one partition, or say why not.
--
-- KEYS
--   1 wm           HASH    the partition's watermark record (fields below)
--   2 definitions  HASH    fingerprint -> canonical JSON of each segment set that profiles may still carry
--
-- ARGV
--   1 owner                 this worker's random name
--   2 last_epoch            the highest epoch this process ever held here, 0 for none
--   3 log_start             where a partition without a wm begins
--   4 processed_below       next offset that is known to have been processed (Kafka's committed offset), or ''
--   5 replay_when_new       replayed_below of a partition without a wm when Kafka knows no offset, or ''
--   6 definitions_id        fingerprint of the segment set of this worker
--   7 definitions_json      its canonical JSON
--   8 n                     number of identity pairs
--   9.. name, value         identity fields: all must equal what wm holds
--
-- Returns {'OK', HGETALL wm} | {'REBUILDING'} | {'TORN'} | {'FOREIGN', field, stored, mine}
local wm, definitions = KEYS[1], KEYS[2]
local n = tonumber(ARGV[8])

if redis.call('HEXISTS', wm, 'rebuilding') == 1 then
  return {'REBUILDING'}
end

local known = redis.call('HEXISTS', wm, 'epoch') == 1
-- Both are written by the same claim: one without the other is no lost state but a torn one, and the log would
-- be folded a second time into the profiles that are left.
if not known and redis.call('EXISTS', definitions) == 1 then
  return {'TORN'}
end
for i = 0, n - 1 do
  local field, mine = ARGV[9 + 2 * i], ARGV[10 + 2 * i]
  local stored = redis.call('HGET', wm, field)
  if known and stored ~= mine then
    return {'FOREIGN', field, stored or '', mine}
  end
end

local processed_below = ARGV[4]
if not known then
  redis.call('HSET', wm, 'epoch', 0, 'commit', 0, 'watermark', ARGV[3], 'stream_time_ms', '',
             'definitions', ARGV[6], 'replayed_below', 0)
  for i = 0, n - 1 do
    redis.call('HSET', wm, ARGV[9 + 2 * i], ARGV[10 + 2 * i])
  end
  if processed_below == '' then
    processed_below = ARGV[5]
  end
end

-- An epoch never goes down, also when Redis was restored from an older snapshot.
local epoch = math.max(tonumber(redis.call('HGET', wm, 'epoch')), tonumber(ARGV[2])) + 1
redis.call('HSET', wm, 'owner', ARGV[1], 'epoch', string.format('%.0f', epoch))

if processed_below ~= '' and tonumber(processed_below) > tonumber(redis.call('HGET', wm, 'watermark'))
   and tonumber(processed_below) > tonumber(redis.call('HGET', wm, 'replayed_below')) then
  redis.call('HSET', wm, 'replayed_below', processed_below)
end

redis.call('HSET', definitions, ARGV[6], ARGV[7])
return {'OK', redis.call('HGETALL', wm)}
