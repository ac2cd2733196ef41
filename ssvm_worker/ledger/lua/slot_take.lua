#!lua flags=allow-oom
-- include: clock slots
-- Take a slot.
-- ARGV: key, holder, seconds, limit -> 1, or 0 if all slots are held.

redis.call('ZREMRANGEBYSCORE', key, '-inf', text(now))
-- No slot is held for an hour: the clock jumped back. Running holders take their slots again.
redis.call('ZREMRANGEBYSCORE', key, text(now + 3600), '+inf')
if redis.call('ZCARD', key) >= tonumber(ARGV[4]) then return 0 end
return take()
