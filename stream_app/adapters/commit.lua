-- commit(wm, due, outbox, definitions, scored, profiles..., members..., next...): make one step of a partition
-- durable, all or nothing.
--
-- KEYS
--   1 wm           HASH    owner, epoch, commit, watermark, stream_time_ms, definitions, ... (see claim.lua)
--   2 due          ZSET    user_id -> instant of the user's next exit, Unix ms
--   3 outbox       STREAM  messages committed and not yet known to be published; entry id <commit>-<n>
--   4 definitions  HASH    fingerprint -> canonical JSON of segment sets in use
--   5 scored       ZSET    user_id -> instant of the user's last scoring, Unix ms
--   6..            STRING  one profile per changed user, msgpack
--   ..             ZSET    one member index per touched segment: user_id -> exits_at, Unix ms, or +inf
--   ..             STRING  next categories and recommendations, one per user who was scored, msgpack
--
-- ARGV
--   1 owner           2 epoch         3 expected commit number (the one before this)
--   4 kind            'commit', or 'trim': only drop the published outbox
--   5 watermark       6 stream_time_ms   7 definitions mark       each '' for "as it is"
--   8 replayed_below  '' for "as it is"
--   9 profiles       10 member keys  11 member changes  12 scores  13 outbox entries    counts
--   then per profile: user_id, blob, expiry (Unix ms, '' for none), due ('' for "as it is", '-' for none, else Unix ms)
--   then per member change: index of its key, user_id, exits_at ('-' to remove)
--   then per score: user_id, blob ('-' to forget it), scored at (Unix ms), expiry (Unix ms, '' for none, '=' as it is)
--   then the outbox entries
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
  {'SET', KEYS[2], ''}, {'DEL', KEYS[3]}, {'ZADD', KEYS[2], 0, ''}, {'ZREM', KEYS[2], ''}, {'ZRANGE', KEYS[2], 0, 0},
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

if ARGV[4] == 'commit' then
  local n_profiles, n_keys = tonumber(ARGV[9]), tonumber(ARGV[10])
  local n_changes, n_scores, n_outbox = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
  local a = 14
  for i = 1, n_profiles do
    local user, blob, expiry, due = ARGV[a], ARGV[a + 1], ARGV[a + 2], ARGV[a + 3]
    if expiry == '' then
      redis.call('SET', KEYS[5 + i], blob)
    else
      redis.call('SET', KEYS[5 + i], blob, 'PXAT', expiry)
    end
    if due == '-' then
      redis.call('ZREM', KEYS[2], user)
    elseif due ~= '' then
      redis.call('ZADD', KEYS[2], due, user)
    end
    a = a + 4
  end
  local members = 5 + n_profiles
  for _ = 1, n_changes do
    local key = KEYS[members + tonumber(ARGV[a])]
    if ARGV[a + 2] == '-' then
      redis.call('ZREM', key, ARGV[a + 1])
    else
      redis.call('ZADD', key, ARGV[a + 2], ARGV[a + 1])
    end
    a = a + 3
  end
  for i = 1, n_scores do
    local user, blob, scored_ms, expiry = ARGV[a], ARGV[a + 1], ARGV[a + 2], ARGV[a + 3]
    local next_key = KEYS[members + n_keys + i]
    if blob == '-' then
      redis.call('DEL', next_key)
      redis.call('ZREM', KEYS[5], user)
    else
      if expiry == '' then
        redis.call('SET', next_key, blob)
      elseif expiry == '=' then
        redis.call('SET', next_key, blob, 'KEEPTTL')
      else
        redis.call('SET', next_key, blob, 'PXAT', expiry)
      end
      redis.call('ZADD', KEYS[5], scored_ms, user)
    end
    a = a + 4
  end
  local number = string.format('%.0f', tonumber(commit) + 1)
  for i = 1, n_outbox do
    redis.call('XADD', KEYS[3], number .. '-' .. i, 'm', ARGV[a])
    a = a + 1
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
