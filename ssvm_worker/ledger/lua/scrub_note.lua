-- include: clock
-- Store the result of reading an artifact. An intact artifact has no findings.
-- KEYS: verified, findings, reached. scrub_results/redis.py explains them.
-- ARGV: place, "store place", findings as JSON, job as JSON, number of findings, seconds that "reached" lasts.

redis.call('ZADD', KEYS[1], text(now), ARGV[1])
redis.call('SET', KEYS[3], ARGV[1], 'EX', ARGV[6])
if ARGV[5] == '0' then return redis.call('HDEL', KEYS[2], ARGV[2]) end
local value = '{"when":' .. text(now) .. ',"job_id":' .. ARGV[4] .. ',"findings":' .. ARGV[3] .. '}'
return redis.call('HSET', KEYS[2], ARGV[2], value)
