#!lua flags=no-writes
-- Return the newest jobs of each index. A job may move to another index, so one script reads all of them.
-- ARGV: prefix, last position or -1, index, … -> for each index ids and times of creation, newest first.

local rows = {}
for at = 3, #ARGV do
  local found = redis.pcall('ZREVRANGE', ARGV[1] .. ARGV[at], 0, ARGV[2], 'WITHSCORES')
  rows[#rows + 1] = found.err and {} or found  -- a key of another type counts as empty
end
return rows
