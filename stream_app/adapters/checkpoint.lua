-- checkpoint(wm, model, deltas): make what a partition's owner has learned durable, or its deltas fewer.
--
-- KEYS
--   1 wm      HASH    owner, epoch, ... (see claim.lua); `checkpoint` is the number of the last one
--   2 model   HASH    schema, settings, writer, number, watermark, ranker, accuracy; base_number and base: all
--                     deltas up to that number as one
--   3 deltas  STREAM  what each checkpoint has added to the counts, field d, and who has written it, field w;
--                     entry id <number>-0
--
-- ARGV
--   1 owner   2 epoch   3 number   4 kind
--   kind 'checkpoint': number is the one before this; 5 delta, then pairs of field and value for the hash
--   kind 'compact':    number is the last delta that 5 base holds; 6 the oldest delta to keep
--
-- Checks, as commit.lua: wm gone, older than mine or being rebuilt -> {'LOST'}; another's -> {'FENCED', owner, epoch};
-- checkpoint number differs -> {'MISMATCH', stored}. Else {'OK'}.
local stored = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'rebuilding', 'checkpoint')
local owner, epoch = stored[1], stored[2]
if not epoch or tonumber(epoch) < tonumber(ARGV[2]) or stored[3] then
  return {'LOST'}
end
if owner ~= ARGV[1] or epoch ~= ARGV[2] then
  return {'FENCED', owner, epoch}
end
local number = stored[4] or '0'
if ARGV[4] == 'checkpoint' then
  if number ~= ARGV[3] then
    return {'MISMATCH', number}
  end
  -- A full Redis refuses a script's first write only: see commit.lua.
  redis.call('HSET', KEYS[1], 'owner', owner)
  local next_number = string.format('%.0f', tonumber(number) + 1)
  local writer = owner .. '-' .. epoch
  redis.call('XADD', KEYS[3], next_number .. '-0', 'd', ARGV[5], 'w', writer)
  for i = 6, #ARGV, 2 do
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  end
  redis.call('HSET', KEYS[2], 'number', next_number, 'writer', writer)
  redis.call('HSET', KEYS[1], 'checkpoint', next_number)
else
  redis.call('HSET', KEYS[2], 'base', ARGV[5], 'base_number', ARGV[3])
  redis.call('XTRIM', KEYS[3], 'MINID', ARGV[6] .. '-0')
end
return {'OK'}
