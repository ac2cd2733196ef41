-- include: clock quota
-- Return the bytes that an account uses, and the bytes that jobs have reserved for it.
-- ARGV: prefix, account -> {used bytes, reserved bytes}.

return { redis.call('HGET', used, account) or '0', integer(reserved('')) }
