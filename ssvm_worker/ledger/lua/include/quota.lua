-- Count the bytes of an account. ARGV[1] is the key prefix, ARGV[2] the account. quota/redis.py lists the keys.

local P, account = ARGV[1], ARGV[2]
local used, sizes = P .. 'used', P .. 'sizes:' .. account
local held, expiry = P .. 'held:' .. account, P .. 'until:' .. account
local function integer(number) return string.format('%.0f', number) end

local function drop(from, to)
  for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', expiry, from, to)) do
    redis.call('ZREM', expiry, job_id)
    redis.call('HDEL', held, job_id)
  end
end

-- Return the bytes that jobs have reserved, except one job.
local function reserved(except)
  drop('-inf', text(now))
  -- No reservation lasts for an hour: the clock jumped back. Running jobs renew their reservations.
  drop(text(now + 3600), '+inf')
  local sum, flat = 0, redis.call('HGETALL', held)
  for at = 1, #flat, 2 do
    if flat[at] ~= except then sum = sum + finite(flat[at + 1], 0) end
  end
  return sum
end
