#!lua flags=allow-oom
-- Store a worker's description and the time of its heartbeat. Forget workers that are silent for too long.
-- ARGV: key, name, description as JSON, seconds until a silent worker is forgotten.

local key, seen = ARGV[1], ARGV[1] .. ':seen'
local now = redis.call('TIME')[1] + 0
redis.call('HSET', key, ARGV[2], ARGV[3])
redis.call('ZADD', seen, now, ARGV[2])
for _, name in ipairs(redis.call('ZRANGEBYSCORE', seen, '-inf', now - ARGV[4])) do
  redis.call('ZREM', seen, name)
  redis.call('HDEL', key, name)
end
return 1
