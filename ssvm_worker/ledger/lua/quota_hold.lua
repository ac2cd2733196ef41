-- include: clock quota
-- Reserve bytes of an account for a job. They replace the job's earlier reservation.
-- ARGV: prefix, account, job, bytes, limit, seconds -> {1 if reserved, used bytes, bytes reserved by other jobs}.

local others, has = reserved(ARGV[3]), finite(redis.call('HGET', used, account), 0)
if has + others + ARGV[4] > tonumber(ARGV[5]) then return { 0, integer(has), integer(others) } end
redis.call('HSET', held, ARGV[3], ARGV[4])
redis.call('ZADD', expiry, text(now + ARGV[6]), ARGV[3])
return { 1, integer(has), integer(others) }
