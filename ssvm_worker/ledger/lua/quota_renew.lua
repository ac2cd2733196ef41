-- include: clock quota
-- Renew a reservation. One that expired while the broker was away is restored, because its job continues anyway.
-- ARGV: prefix, account, job, bytes, seconds.

redis.call('HSETNX', held, ARGV[3], ARGV[4])
return redis.call('ZADD', expiry, text(now + ARGV[5]), ARGV[3])
