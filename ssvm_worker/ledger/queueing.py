"""Who is next, as Lua: the queues that the scripts keep, one of each lane, and one of each limit that jobs wait at.

Keys, all below ``<prefix>ssvm.ledger:``; a queue's name is ``lane:<zone> <lane>`` or that of the limit

    all:<queue>                     ids by time of creation
    q:<queue>                       the priorities that wait in it
    q:<queue> <priority>            who waits with that priority, by turn; who = "zone lane account"
    q:<queue> <priority> <who>      ids by time of creation
    queues                          the names of those that are not empty
    picks                           hash: how many were taken off a queue, since it was last empty
    running                         hash: running jobs by who
    served                          who by the number of the claim that it got last; seq is that number
    places:<who>                    the keys q:… in which it waits, whose scores must follow its turn
    slots:<limit>                   the running jobs that count there

The order: the higher priority; then whoever has the fewest jobs running in that lane; then whoever was served longest
ago; then the older job. Every tenth that is taken off a queue is its oldest, so that none waits for ever. Whatever is
done here costs O(log n) of the jobs that wait.
"""

from __future__ import annotations

#: Every so many-th claim goes by age alone.
_BY_AGE = 10
#: The priority of a job that a limit let go by its age; requests have 0 to 9.
_AGED = 10
#: Accounts whose last turn is remembered.
_REMEMBERED = 10_000

QUEUES = f"""
-- How many may run at once by kind of limit; 0 is any number.
local LIMITS = {{}}
-- Jobs that may be tried again, and have no message any more.
local freed = {{}}

local function who_of(which) return get('zone', which) .. ' ' .. get('lane', which) .. ' ' .. get('account', which) end
local function lane_of(which) return 'lane:' .. get('zone', which) .. ' ' .. get('lane', which) end
local function all(q) return P .. 'all:' .. q end
local function levels(q) return P .. 'q:' .. q end
local function turns(q, level) return levels(q) .. ' ' .. level end
local function line(q, level, who) return turns(q, level) .. ' ' .. who end
local function slots(limit) return P .. 'slots:' .. limit end

-- Fewer running first, then longer ago; 2^40 claims are enough.
local function turn(who)
  local running = tonumber(redis.call('HGET', P .. 'running', who) or '0')
  local served = tonumber(redis.call('ZSCORE', P .. 'served', who) or '0')
  return string.format('%.0f', running * 1099511627776 + served)
end

local function rescore(who)
  local places = redis.call('SMEMBERS', P .. 'places:' .. who)
  if #places == 0 then return end
  local score = turn(who)
  for _, key in ipairs(places) do redis.call('ZADD', key, 'XX', score, who) end
end

local function enqueue(which, q, level)
  local who, at = who_of(which), get('created', which)
  level = level or tonumber(get('priority', which)) or 0
  if not redis.call('ZSCORE', turns(q, level), who) then
    redis.call('SADD', P .. 'queues', q)
    redis.call('ZADD', levels(q), level, level)
    redis.call('ZADD', turns(q, level), turn(who), who)
    redis.call('SADD', P .. 'places:' .. who, turns(q, level))
  end
  redis.call('ZADD', line(q, level, who), at, which)
  redis.call('ZADD', all(q), at, which)
  put(which, 'queue', q, 'level', level)
end

local function remove(which, q, level, who)
  redis.call('ZREM', all(q), which)
  redis.call('ZREM', line(q, level, who), which)
  if redis.call('EXISTS', line(q, level, who)) == 1 then return end
  redis.call('ZREM', turns(q, level), who)
  redis.call('SREM', P .. 'places:' .. who, turns(q, level))
  if redis.call('EXISTS', turns(q, level)) == 1 then return end
  redis.call('ZREM', levels(q), level)
  if redis.call('EXISTS', levels(q)) == 1 then return end
  redis.call('SREM', P .. 'queues', q)
  redis.call('HDEL', P .. 'picks', q)
end

local function dequeue(which)
  local q = get('queue', which)
  if q == '' then return end
  remove(which, q, get('level', which), who_of(which))
  put(which, 'queue', '', 'level', '')
end

-- The next job of a queue, and whether it is so by its age; it stays there.
local function pick(q)
  local level, oldest = redis.call('ZREVRANGE', levels(q), 0, 0)[1], nil
  if level and redis.call('HINCRBY', P .. 'picks', q, 1) % {_BY_AGE} == 0 then
    oldest = redis.call('ZRANGE', all(q), 0, 0)[1]
  end
  if oldest and get('state', oldest) == 'queued' then return oldest, true end
  while level do
    local who = redis.call('ZRANGE', turns(q, level), 0, 0)[1]
    local which = redis.call('ZRANGE', line(q, level, who), 0, 0)[1]
    if get('state', which) == 'queued' then return which, false end
    remove(which, q, level, who)  -- somebody has deleted its record by hand
    level = redis.call('ZREVRANGE', levels(q), 0, 0)[1]
  end
end

-- What the job takes a slot of.
local function limits_of(which)
  local found = {{}}
  for each in string.gmatch(get('uses', which), '[^\\n]+') do found[#found + 1] = each end
  local resource = get('resource', which)
  if resource ~= '' then found[#found + 1] = 'resource:' .. resource end
  return found
end

local function free(limit)
  local kind = string.match(limit, '^%a+')
  local most = kind == 'resource' and 1 or LIMITS[kind] or 0
  return most == 0 and math.huge or most - redis.call('SCARD', slots(limit))
end

-- Let the next job that waits at a limit try its luck in its lane.
local function wake(limit)
  local which, aged = pick(limit)
  if not which then return false end
  dequeue(which)
  enqueue(which, lane_of(which), aged and {_AGED} or nil)
  put(which, 'ready', text(now))
  freed[#freed + 1] = which
  return true
end

-- The first limit that keeps the job from running, or nil.
local function obstacle(which)
  for _, limit in ipairs(limits_of(which)) do
    if free(limit) <= 0 then return limit end
  end
end

-- Wait at that limit; whoever waits for the others may go instead.
local function park(which, limit)
  if get('queue', which) == limit then return end
  dequeue(which)
  enqueue(which, limit)
  for _, other in ipairs(limits_of(which)) do
    if other ~= limit and free(other) > 0 then wake(other) end
  end
end

local function run(which)
  local who = who_of(which)
  dequeue(which)
  for _, limit in ipairs(limits_of(which)) do redis.call('SADD', slots(limit), which) end
  redis.call('HINCRBY', P .. 'running', who, 1)
  local seq = redis.call('INCR', P .. 'seq')
  redis.call('ZADD', P .. 'served', seq, who)
  if seq % 100 == 0 then redis.call('ZREMRANGEBYRANK', P .. 'served', 0, -{_REMEMBERED} - 1) end
  rescore(who)
end

local function run_no_more(which)
  local who = who_of(which)
  for _, limit in ipairs(limits_of(which)) do
    redis.call('SREM', slots(limit), which)
    wake(limit)
  end
  if redis.call('HINCRBY', P .. 'running', who, -1) <= 0 then redis.call('HDEL', P .. 'running', who) end
  rescore(who)
end

local function set_limits(store, source, account)
  LIMITS = {{ store = tonumber(store), source = tonumber(source), account = tonumber(account) }}
end

-- Whatever was missed: a limit that was raised, a slot that nobody holds, a job that was woken and did not come.
local function mend(limit)
  for _, each in ipairs(redis.call('SMEMBERS', slots(limit))) do
    if get('state', each) ~= 'running' then redis.call('SREM', slots(limit), each) end
  end
  for _ = 1, math.min(100, free(limit)) do
    if not wake(limit) then return end
  end
end
"""
