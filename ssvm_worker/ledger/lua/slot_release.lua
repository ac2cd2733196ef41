-- Release a slot.
-- ARGV: key, holder.

return redis.call('ZREM', ARGV[1], ARGV[2])
