-- A semaphore that expires. ARGV: key, holder, seconds.

local key, holder = ARGV[1], ARGV[2]
local function take()
  redis.call('ZADD', key, text(now + ARGV[3]), holder)
  redis.call('PEXPIRE', key, math.ceil(ARGV[3] * 1000))
  return 1
end
