-- include: clock quota
-- Store the size of an artifact. The reservation of its job shrinks by the added bytes.
-- ARGV: prefix, account, "store place", bytes or '' for a deleted artifact, job or ''.

local previous = finite(redis.call('HGET', sizes, ARGV[3]), 0)
if ARGV[4] == '' then redis.call('HDEL', sizes, ARGV[3]) else redis.call('HSET', sizes, ARGV[3], ARGV[4]) end
local added = (tonumber(ARGV[4]) or 0) - previous
redis.call('HINCRBY', used, account, integer(added))
local reservation = finite(redis.call('HGET', held, ARGV[5]), 0)
if reservation > 0 then redis.call('HSET', held, ARGV[5], integer(math.max(0, reservation - added))) end
return 1
