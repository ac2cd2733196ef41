-- Store the demand for workers. Entries older than the given seconds are deleted.
-- ARGV: key, demand, seconds -> the highest demand of that time.

local now = redis.call('TIME')[1] + 0
redis.call('ZADD', ARGV[1], now, now .. ':' .. ARGV[2])
redis.call('ZREMRANGEBYSCORE', ARGV[1], '-inf', now - ARGV[3])
redis.call('EXPIRE', ARGV[1], math.ceil(ARGV[3]))
local highest = 0
for _, entry in ipairs(redis.call('ZRANGE', ARGV[1], 0, -1)) do
  highest = math.max(highest, tonumber(string.match(entry, ':(%d+)$')) or 0)
end
return highest
