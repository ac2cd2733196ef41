#!lua flags=allow-oom
-- include: clock slots
-- Renew a slot. One that expired while the broker was away is taken again, because its holder continues anyway.
-- ARGV: key, holder, seconds -> 1.

return take()
