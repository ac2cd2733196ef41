#!lua flags=no-writes
-- Return each job's record. A job may end between two calls, so one script reads all of them.
-- ARGV: prefix, id, … -> for each id the fields of its hash, and the string of its ended record.

local rows = {}
for at = 2, #ARGV do
  -- pcall: a key of another type counts as no record.
  local flat = redis.pcall('HGETALL', ARGV[1] .. 'job:' .. ARGV[at])
  local packed = redis.pcall('GET', ARGV[1] .. 'ended:' .. ARGV[at])
  rows[#rows + 1] = flat.err and {} or flat
  rows[#rows + 1] = type(packed) == 'string' and packed
end
return rows
