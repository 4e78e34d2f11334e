-- commit(wm, due, outbox, definitions, scored, profiles..., members..., next...): make one step of a partition
-- durable, all or nothing.
--
-- KEYS
--   1 wm           HASH    owner, epoch, commit, watermark, stream_time_ms, definitions, ... (see claim.lua)
--   2 due          ZSET    user_id -> instant of the user's next exit, Unix ms
--   3 outbox       STREAM  messages committed and not yet known to be published; entry id <commit>-<n>,
--                          up to 100 in an entry, their field its number in the commit
--   4 definitions  HASH    fingerprint -> canonical JSON of segment sets in use
--   5 scored       ZSET    user_id -> instant of the user's last scoring, Unix ms
--   6..            STRING  one profile per changed user, msgpack; those that expire at the end
--   ..             ZSET    one member index per touched segment: user_id -> exits_at, Unix ms, or +inf
--   ..             STRING  next categories and recommendations, one per user who was scored, msgpack
--
-- ARGV
--   1 owner           2 epoch         3 expected commit number (the one before this)
--   4 kind            'commit', or 'trim': only drop the published outbox
--   5 watermark       6 stream_time_ms   7 definitions mark       each '' for "as it is"
--   8 replayed_below  '' for "as it is"
--   9 profiles that stay   10 profiles that expire   11 next exits   12 users without one any more
--   13 member indexes      14 scores                 15 outbox messages       counts
--   then the profiles that stay: blob
--   then those that expire: blob, expiry (Unix ms)
--   then the next exits: Unix ms, user_id; then the users without one
--   then per member index: how many are in it, how many are not any more; exits_at, user_id of each; user_id of each
--   then per score: user_id, blob ('-' to forget it), scored at (Unix ms), expiry (Unix ms, '' for none, '=' as it is)
--   then the outbox's messages
--
-- What a call from Lua costs, 1 to 2 us, is more than what most of them do: whatever can be said of many at once is
-- (14 us of it an event became 8).
--
-- Checks, in this order: wm gone, older than mine or being rebuilt -> {'LOST'}; another's -> {'FENCED', owner, epoch};
-- commit number differs -> {'MISMATCH', stored}; a command below is denied -> NOPERM. Else {'OK', next due instant
-- or ''}.
local stored = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'commit', 'rebuilding')
local owner, epoch, commit = stored[1], stored[2], stored[3]
if not epoch or tonumber(epoch) < tonumber(ARGV[2]) or stored[4] then
  return {'LOST'}
end
if owner ~= ARGV[1] or epoch ~= ARGV[2] then
  return {'FENCED', owner, epoch}
end
if commit ~= ARGV[3] then
  return {'MISMATCH', commit}
end

-- A command that the ACL denies ends a script where it stands, and what is written stays written: so ask first for
-- all of them. Redis before 7 cannot be asked.
for _, command in ipairs(redis.acl_check_cmd and {
  {'SET', KEYS[2], ''}, {'MSET', KEYS[2], ''}, {'DEL', KEYS[3]}, {'ZADD', KEYS[2], 0, ''}, {'ZREM', KEYS[2], ''}, {'ZRANGE', KEYS[2], 0, 0},
  {'XADD', KEYS[3], '*', '', ''}, {'HSET', KEYS[1], '', ''}, {'HKEYS', KEYS[4]}, {'HDEL', KEYS[4], ''},
} or {}) do
  if not redis.acl_check_cmd(unpack(command)) then
    return redis.error_reply("NOPERM this user has no permissions to run the '" .. command[1]:lower() .. "' command")
  end
end

-- A Redis that is full refuses a script's first write if that may take memory, and lets every later one
-- through: so the first is one that changes nothing.
if ARGV[4] == 'commit' then
  redis.call('HSET', KEYS[1], 'owner', owner)
end

-- Whoever reaches this line has published everything that the outbox holds.
redis.call('DEL', KEYS[3])

-- Lua's stack takes 8,000 values; an even number, for pairs.
local AT_ONCE = 1000

-- Where a part of a list ends that begins at `first`.
local function part(first, last)
  return math.min(first + AT_ONCE - 1, last)
end

if ARGV[4] == 'commit' then
  local n_staying, n_expiring = tonumber(ARGV[9]), tonumber(ARGV[10])
  local n_due, n_undue = tonumber(ARGV[11]), tonumber(ARGV[12])
  local n_indexes, n_scores, n_outbox = tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[15])
  local k, a = 5, 15  -- the last key and the last argument that are done with
  local blobs = {}
  for i = 1, n_staying do
    blobs[2 * i - 1], blobs[2 * i] = KEYS[k + i], ARGV[a + i]
  end
  for i = 1, #blobs, AT_ONCE do
    redis.call('MSET', unpack(blobs, i, part(i, #blobs)))
  end
  k, a = k + n_staying, a + n_staying
  for i = 1, n_expiring do
    redis.call('SET', KEYS[k + i], ARGV[a + 2 * i - 1], 'PXAT', ARGV[a + 2 * i])
  end
  k, a = k + n_expiring, a + 2 * n_expiring
  for i = a + 1, a + 2 * n_due, AT_ONCE do
    redis.call('ZADD', KEYS[2], unpack(ARGV, i, part(i, a + 2 * n_due)))
  end
  a = a + 2 * n_due
  for i = a + 1, a + n_undue, AT_ONCE do
    redis.call('ZREM', KEYS[2], unpack(ARGV, i, part(i, a + n_undue)))
  end
  a = a + n_undue
  for index = k + 1, k + n_indexes do
    local n_in, n_out = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2])
    a = a + 2
    for i = a + 1, a + 2 * n_in, AT_ONCE do
      redis.call('ZADD', KEYS[index], unpack(ARGV, i, part(i, a + 2 * n_in)))
    end
    a = a + 2 * n_in
    for i = a + 1, a + n_out, AT_ONCE do
      redis.call('ZREM', KEYS[index], unpack(ARGV, i, part(i, a + n_out)))
    end
    a = a + n_out
  end
  k = k + n_indexes
  local scores, scored = {}, {}
  for i = 1, n_scores do
    local user, blob, scored_ms, expiry = ARGV[a + 1], ARGV[a + 2], ARGV[a + 3], ARGV[a + 4]
    local next_key = KEYS[k + i]
    if blob == '-' then
      redis.call('DEL', next_key)
      redis.call('ZREM', KEYS[5], user)
    else
      if expiry == '' then
        scores[#scores + 1], scores[#scores + 2] = next_key, blob
      elseif expiry == '=' then
        redis.call('SET', next_key, blob, 'KEEPTTL')
      else
        redis.call('SET', next_key, blob, 'PXAT', expiry)
      end
      scored[#scored + 1], scored[#scored + 2] = scored_ms, user
    end
    a = a + 4
  end
  for i = 1, #scores, AT_ONCE do
    redis.call('MSET', unpack(scores, i, part(i, #scores)))
  end
  for i = 1, #scored, AT_ONCE do
    redis.call('ZADD', KEYS[5], unpack(scored, i, part(i, #scored)))
  end
  local number = string.format('%.0f', tonumber(commit) + 1)
  for first = 1, n_outbox, 100 do
    local fields = {}
    for i = first, math.min(first + 99, n_outbox) do
      fields[#fields + 1], fields[#fields + 2] = i, ARGV[a + i]
    end
    redis.call('XADD', KEYS[3], number .. '-' .. math.ceil(first / 100), unpack(fields))
  end
  if ARGV[7] ~= '' then
    redis.call('HSET', KEYS[1], 'definitions', ARGV[7])
    for _, id in ipairs(redis.call('HKEYS', KEYS[4])) do
      if id ~= ARGV[7] then
        redis.call('HDEL', KEYS[4], id)
      end
    end
  end
  if ARGV[8] ~= '' then
    redis.call('HSET', KEYS[1], 'replayed_below', ARGV[8])
  end
  if ARGV[6] ~= '' then
    redis.call('HSET', KEYS[1], 'stream_time_ms', ARGV[6])
  end
  if ARGV[5] ~= '' then
    redis.call('HSET', KEYS[1], 'watermark', ARGV[5])
  end
  redis.call('HSET', KEYS[1], 'commit', number)
end

local head = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
return {'OK', head[2] or ''}
