"""What keeps jobs going and ends their records, as Lua: rounds of the reaper, and the end of old records."""

from __future__ import annotations

#: ARGV[2..]: claim_s, every_s, max_attempts, ring_again_s, error of a lost attempt, Celery's key prefix, '1' if
#: messages go elsewhere, limits -> ids to ring, and ids to ring if no message stands in their queue, which the caller
#: can see.
#: A round sooner than every_s after the last one does nothing, so that any number of reapers make one.
REAP = """
local claim_s, every_s, again_s = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[5])
set_limits(ARGV[9], ARGV[10], ARGV[11])
local last = tonumber(redis.call('HGET', P .. 'reaper', 'last') or '0')

-- What was to be at some time is that much sooner. Claims of the dead would stay for hours; the living renew theirs.
local function set_back(by)
  for _, each in ipairs(redis.call('ZRANGE', P .. 'due', 0, -1)) do
    redis.call('ZINCRBY', P .. 'due', text(-by), each)
    put(each, 'not_before', text(get('not_before', each) - by))
  end
  for _, each in ipairs(redis.call('ZRANGE', P .. 'callbacks', 0, -1)) do
    redis.call('ZINCRBY', P .. 'callbacks', text(-by), each)
  end
  for _, each in ipairs(redis.call('ZRANGE', P .. 'claims', 0, -1)) do
    redis.call('ZADD', P .. 'claims', text(now + claim_s), each)
  end
  redis.call('HSET', P .. 'reaper', 'spare', text(now + claim_s))
end

if now < last then set_back(last - now) end
if now >= last and now - last < every_s * 0.8 then return {{}, {}} end
-- Nobody looked for a while: the broker was away, or all workers were. The living get one claim's time to renew.
if now - last > math.max(claim_s / 2, every_s * 3) then
  redis.call('HSET', P .. 'reaper', 'spare', text(now + claim_s))
end
redis.call('HSET', P .. 'reaper', 'last', text(now))

if now > tonumber(redis.call('HGET', P .. 'reaper', 'spare') or '0') then
  for _, lost in ipairs(redis.call('ZRANGEBYSCORE', P .. 'claims', '-inf', text(now), 'LIMIT', 0, 100)) do
    let_go(lost, ARGV[6])
    local ending = get('ending', lost)
    if ending ~= '' then
      conclude(lost, ending, 'progress', '')
    else
      put(lost, 'error', ARGV[6])
      if get('cancel', lost) == '1' then put(lost, 'ending', 'cancelled')
      elseif tonumber(get('tries', lost)) >= tonumber(ARGV[4]) then put(lost, 'ending', 'failed') end
      queue(lost, 0)
      freed[#freed + 1] = lost
    end
  end
end

for _, due in ipairs(redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', text(now), 'LIMIT', 0, 100)) do
  queue(due, 0)
  freed[#freed + 1] = due
end

-- Jobs that have been ready for a while, in lanes without any message.
local ask = {}
for _, q in ipairs(redis.call('SMEMBERS', P .. 'queues')) do
  local lane = string.match(q, '^lane:(.*)$')
  local elsewhere = ARGV[8] ~= ''
  if not lane then
    mend(q)
  elseif elsewhere or redis.call('LLEN', ARGV[7] .. 'ssvm.' .. (string.gsub(lane, ' ', '.'))) == 0 then
    for _, each in ipairs(redis.call('ZRANGE', all(q), 0, 99)) do
      local since = tonumber(get('ready', each)) or 0
      if now - since > again_s or since > now then  -- or the clock was set back
        put(each, 'ready', text(now))
        table.insert(elsewhere and ask or freed, each)
      end
    end
  end
end
return { freed, ask }
"""

#: ARGV[2]: keep_s -> how many records were dropped.
EXPIRE = """
local old = redis.call('ZRANGEBYSCORE', P .. 'ended', '-inf', text(now - ARGV[2]), 'LIMIT', 0, 100)
for _, each in ipairs(old) do
  redis.call('ZREM', index(each, get('state', each)), each)
  count(each, get('state', each), -1)
  redis.call('ZREM', P .. 'ended', each)
  redis.call('ZREM', P .. 'callbacks', each)
  redis.call('DEL', job(each), ended(each))
end
return #old
"""
