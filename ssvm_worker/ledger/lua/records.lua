#!lua flags=no-writes
-- Return each job's record. A job may end between two calls, so one script reads all of them.
-- ARGV: prefix, id, … -> for each id the fields of its hash, and the string of its ended record.

local rows = {}
for at = 2, #ARGV do
  rows[#rows + 1] = redis.call('HGETALL', ARGV[1] .. 'job:' .. ARGV[at])
  rows[#rows + 1] = redis.call('GET', ARGV[1] .. 'ended:' .. ARGV[at])
end
return rows
