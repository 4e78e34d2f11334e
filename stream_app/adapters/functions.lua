#!lua name=stream_app
-- Read-only functions for apps of any language: a user's weights decayed to now, memberships, next categories.
--
-- This is a template: `functions.py` fills in the four values between @ signs. Sums can only be read with the
-- half-lives that they were stored under, so a library belongs to one weights setting and one clock.
--
-- FCALL_RO sa_version  0
-- FCALL_RO sa_weights  1 profile       [now]
-- FCALL_RO sa_segments 1 profile       [now]
-- FCALL_RO sa_next     2 profile next  [now]
--
-- KEYS
--   profile  STRING  sa:{p}:profile:<user_id>, msgpack; fields as in stream_app/core/profile.py
--   next     STRING  sa:{p}:next:<user_id>, msgpack; fields as in stream_app/core/scores.py
--
-- ARGV
--   now      Unix milliseconds; '' or none: the server's time. With the event clock it must be given: the
--            service's "now" is then stream_time_ms of sa:{p}:wm.
--
-- Replies: nil for a user who is unknown or forgotten at now. Instants are integers; weights and scores are
-- strings that hold a double exactly (%.17g), since a reply cuts a Lua number to an integer.
--   sa_version   version
--   sa_weights   [now, [[event_type, total, [label, weight, ...], [asset_id, weight, ...]], ...]], in no order
--   sa_segments  [now, [[segment_id, 'base', exits_at or nil],
--                       [segment_id, 'discovery', exits_at or nil, [label, ...], score], ...]], by segment id
--   sa_next      [scored_at or nil, model version or nil, [label, score, ...],
--                 [[event_type, asset_id or nil, [label, ...], growth_weight, base_weight], ...]], best first;
--                 nil, nil, [], [] for a user who was never scored
local VERSION = '@VERSION@'
local CLOCK = '@CLOCK@'
local DEFAULT_HALF_LIFE_MS = @DEFAULT_HALF_LIFE_MS@
local HALF_LIVES_MS = {@HALF_LIVES_MS@}

local SCHEMA_VERSION = 1
-- 10000-01-01: an instant at or after it is never.
local NEVER_MS = 253402300800000

local function refuse(message)
  error({err = 'ERR ' .. message})
end

local function unreadable(what, problem)
  refuse('not a ' .. what .. ' of schema ' .. SCHEMA_VERSION .. ': ' .. problem .. '. Find out what else writes '
         .. 'to the keys sa:{p}:' .. what .. ':*, then run `stream-app rebuild`.')
end

local function exact(number, what)
  if type(number) ~= 'number' or number ~= number or number == math.huge or number == -math.huge then
    unreadable(what, 'expected a finite number, got ' .. tostring(number))
  end
  return string.format('%.17g', number)
end

local function of_type(name, value, what, field)
  if type(value) ~= name then
    unreadable(what, 'expected a ' .. name .. ' in ' .. field .. ', got ' .. type(value))
  end
  return value
end

-- false, which a reply shows as nil, for what is absent: nil would end the array that holds it.
local function optional(name, value, what, field)
  return value ~= nil and of_type(name, value, what, field)
end

-- A document's fields. Redis's cmsgpack knows no bytes (bin 8 to 32), and a profile has a field of them, so
-- the map is taken apart here and its values one by one; bytes are skipped.
local BYTES = {[0xc4] = '>B', [0xc5] = '>I2', [0xc6] = '>I4'}

local function fields_of(blob)
  local head = string.byte(blob, 1) or 0
  if head < 0x80 or head > 0x8f then
    error('expected a map', 0)
  end
  local fields, offset = {}, 1
  for _ = 1, head - 0x80 do
    local name
    offset, name = cmsgpack.unpack_one(blob, offset)
    local length = BYTES[string.byte(blob, offset + 1)]
    if length then
      length, offset = struct.unpack(length, blob, offset + 2)
      offset = offset + length - 1
    else
      offset, fields[name] = cmsgpack.unpack_one(blob, offset)
    end
    -- cmsgpack says -1 for the end.
    if offset < 0 then
      offset = #blob
    end
  end
  if offset ~= #blob then
    error('expected nothing behind the map', 0)
  end
  return fields
end

local function decoded(blob, what)
  local read, fields = pcall(fields_of, blob)
  if not read then
    unreadable(what, tostring(type(fields) == 'table' and fields.err or fields))
  end
  if fields.v ~= SCHEMA_VERSION then
    unreadable(what, 'got v = ' .. tostring(fields.v))
  end
  return fields
end

local function told(name, keys, args, expected)
  if #keys ~= expected or #args > 1 then
    refuse(name .. ': expected ' .. expected .. ' key(s) and at most one argument, now; got ' .. #keys
           .. ' and ' .. #args)
  end
  local now = args[1] or ''
  if now == '' then
    if CLOCK == 'event' then
      refuse(name .. ': expected now in Unix milliseconds, got none; with the event clock it is '
             .. 'stream_time_ms of the hash sa:{p}:wm')
    end
    local time = redis.call('TIME')
    return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  end
  if #now > 15 or not string.find(now, '^%-?%d+$') then
    refuse(name .. ': expected now in Unix milliseconds, got ' .. string.format('%q', string.sub(now, 1, 40)))
  end
  return tonumber(now)
end

-- The profile's document, nil for a user who is unknown or, past the forget instant and without a base
-- membership, forgotten: the next record would start a new profile.
local function profile_of(key, now)
  local blob = redis.call('GET', key)
  if not blob then
    return nil
  end
  local profile = decoded(blob, 'profile')
  of_type('table', profile.m, 'profile', 'm')
  if now > of_type('number', profile.f, 'profile', 'f') then
    local member = false
    for _, membership in pairs(profile.m) do
      member = member or of_type('table', membership, 'profile', 'm')[2] ~= nil
    end
    if not member then
      return nil
    end
  end
  return profile
end

-- Hundreds of items a user: looks at each as little as will do.
local function pairs_of(sums, left)
  local type, format = type, string.format
  local flat, n = {}, 0
  for name, sum in pairs(of_type('table', sums, 'profile', 'w')) do
    -- Nothing but a finite number is 0 when multiplied by it.
    if type(name) ~= 'string' or type(sum) ~= 'number' or sum * 0 ~= 0 then
      unreadable('profile', 'expected finite numbers by name in w')
    end
    flat[n + 1] = name
    flat[n + 2] = format('%.17g', sum * left)
    n = n + 2
  end
  return flat
end

local function sa_weights(keys, args)
  local now = told('sa_weights', keys, args, 1)
  local profile = profile_of(keys[1], now)
  if not profile then
    return nil
  end
  local elapsed_ms = math.max(0, now - of_type('number', profile.l, 'profile', 'l'))
  local weights = {}
  for event_type, sums in pairs(of_type('table', profile.w, 'profile', 'w')) do
    of_type('string', event_type, 'profile', 'w')
    of_type('table', sums, 'profile', 'w')
    local left = 2 ^ (-elapsed_ms / (HALF_LIVES_MS[event_type] or DEFAULT_HALF_LIFE_MS))
    local total = of_type('number', sums[1], 'profile', 'w') * left
    weights[#weights + 1] = {
      event_type, exact(total, 'profile'), pairs_of(sums[2], left), pairs_of(sums[3], left)
    }
  end
  return {now, weights}
end

local function sa_segments(keys, args)
  local now = told('sa_segments', keys, args, 1)
  local profile = profile_of(keys[1], now)
  if not profile then
    return nil
  end
  local found = {}
  local function add(memberships, field, kind)
    for segment_id, membership in pairs(optional('table', memberships, 'profile', field) or {}) do
      of_type('string', segment_id, 'profile', field)
      local exits_at = of_type('table', membership, 'profile', field)[2]
      if exits_at ~= nil and of_type('number', exits_at, 'profile', field) > now then
        local row = {segment_id, kind, exits_at < NEVER_MS and exits_at}
        if kind == 'discovery' then
          row[4] = optional('table', membership[3], 'profile', field) or {}
          row[5] = exact(membership[4], 'profile')
        end
        found[#found + 1] = row
      end
    end
  end
  add(profile.m, 'm', 'base')
  add(profile.p, 'p', 'discovery')
  table.sort(found, function(a, b) return a[1] < b[1] end)
  return {now, found}
end

local function sa_next(keys, args)
  local now = told('sa_next', keys, args, 2)
  if not profile_of(keys[1], now) then
    return nil
  end
  local blob = redis.call('GET', keys[2])
  if not blob then
    return {false, false, {}, {}}
  end
  local scores = decoded(blob, 'next')
  local categories, recommendations = {}, {}
  for _, scored in ipairs(of_type('table', scores.n, 'next', 'n')) do
    of_type('table', scored, 'next', 'n')
    categories[#categories + 1] = of_type('string', scored[1], 'next', 'n')
    categories[#categories + 1] = exact(scored[2], 'next')
  end
  for _, scored in ipairs(of_type('table', scores.r, 'next', 'r')) do
    of_type('table', scored, 'next', 'r')
    recommendations[#recommendations + 1] = {
      of_type('string', scored[1], 'next', 'r'), optional('string', scored[2], 'next', 'r'),
      of_type('table', scored[3], 'next', 'r'), exact(scored[4], 'next'), exact(scored[5], 'next')
    }
  end
  return {
    of_type('number', scores.t, 'next', 't'), of_type('string', scores.m, 'next', 'm'),
    categories, recommendations
  }
end

local function sa_version()
  return VERSION
end

-- Redis adds its own line number to an error that is raised, not to one that is returned.
local function answering(callback)
  return function(keys, args)
    local well, answer = pcall(callback, keys, args)
    if well or type(answer) == 'table' then
      return answer
    end
    return redis.error_reply('ERR ' .. tostring(answer))
  end
end

redis.register_function{function_name = 'sa_version', callback = sa_version, flags = {'no-writes'}}
redis.register_function{function_name = 'sa_weights', callback = answering(sa_weights), flags = {'no-writes'}}
redis.register_function{function_name = 'sa_segments', callback = answering(sa_segments), flags = {'no-writes'}}
redis.register_function{function_name = 'sa_next', callback = answering(sa_next), flags = {'no-writes'}}
