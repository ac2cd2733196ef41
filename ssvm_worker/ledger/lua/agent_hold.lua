#!lua flags=allow-oom
-- include: clock
-- Take or renew the claim to the GUID of an agent. With 0 seconds: release it.
-- ARGV: key, GUID, holder, seconds, description -> false if another agent holds it. Otherwise the description of the
-- agent that held it before, or '' if that is this one.

local before = ''
local found = redis.call('HGET', ARGV[1], ARGV[2])
if found then
  local old = cjson.decode(found)
  -- A claim that ends in more than an hour is from before the clock jumped back.
  if old.holder ~= ARGV[3] and old['until'] > now and old['until'] < now + 3600 then return false end
  if old.holder ~= ARGV[3] then before = old.info end
end
local ending = tonumber(ARGV[4]) > 0 and now + ARGV[4] or 0
local entry = {holder = ARGV[3], seen = now, ['until'] = ending, info = ARGV[5]}
redis.call('HSET', ARGV[1], ARGV[2], cjson.encode(entry))
return before
