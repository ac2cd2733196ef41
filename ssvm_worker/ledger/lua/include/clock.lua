-- The broker's clock. All workers use it, so their own clocks need not agree.

local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000  -- seconds since the epoch
-- tostring() keeps 14 digits, which is too few for a time with microseconds.
local function text(number) return string.format('%.6f', number) end
-- Return a stored number, or the default if it is missing or invalid. A sorted set refuses NaN.
local function finite(value, default)
  local number = tonumber(value)
  return number and math.abs(number) < 1e18 and number or default
end
