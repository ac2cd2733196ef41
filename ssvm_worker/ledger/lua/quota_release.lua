-- include: clock quota
-- Delete the reservation of a job.
-- ARGV: prefix, account, job.

redis.call('ZREM', expiry, ARGV[3])
return redis.call('HDEL', held, ARGV[3])
