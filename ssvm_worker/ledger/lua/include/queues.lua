-- Choose the next job. Each lane has a queue, and so has each limit at which jobs wait.
--
-- A queue is named "lane:<zone> <lane>", or as the limit. A tenant is "zone lane account".
-- Keys below "<prefix>ssvm.ledger:":
--   all:<queue>                      sorted set: ids by time of creation
--   q:<queue>                        sorted set: the priorities that wait in the queue
--   q:<queue> <priority>             sorted set: tenants that wait with that priority, by their turn
--   q:<queue> <priority> <tenant>    sorted set: ids by time of creation
--   queues                           set: names of the queues that are not empty
--   picks                            hash: number of picks from each queue since it was last empty
--   running                          hash: number of running jobs by tenant
--   served                           sorted set: tenants by the number of their latest claim
--   seq                              the number of the latest claim
--   places:<tenant>                  set: the keys q:… that hold the tenant, whose scores follow its turn
--   slots:<limit>                    set: the running jobs that count for the limit
--
-- The order of jobs in a queue:
--   1. the higher priority
--   2. the tenant with fewer running jobs in that lane
--   3. the tenant whose latest claim is older
--   4. the older job
-- Every tenth pick takes the oldest job of the queue, so that no job starves.
-- Every function here costs O(log n) of the jobs that wait.

-- Every BY_AGE-th pick ignores priorities and turns.
local BY_AGE = 10
-- The priority of a job that a limit released because of its age. Requests have 0 to 9.
local AGED = 10
-- Number of tenants whose latest claim is remembered.
local REMEMBERED = 10000

-- Jobs that may run at once, by kind of limit. 0 means no limit.
local LIMITS = {}
-- Jobs that may run now and have no Celery message. The caller must send one for each.
local to_wake = {}

local function tenant_of(job_id)
  return get('zone', job_id) .. ' ' .. get('lane', job_id) .. ' ' .. get('account', job_id)
end
local function lane_queue(job_id) return 'lane:' .. get('zone', job_id) .. ' ' .. get('lane', job_id) end
local function all_key(queue) return P .. 'all:' .. queue end
local function priorities_key(queue) return P .. 'q:' .. queue end
local function tenants_key(queue, priority) return priorities_key(queue) .. ' ' .. priority end
local function jobs_key(queue, priority, tenant) return tenants_key(queue, priority) .. ' ' .. tenant end
local function slots_key(limit) return P .. 'slots:' .. limit end

-- Return a tenant's score: fewer running jobs first, then the older claim. A score has room for 2^40 claims.
local function turn_of(tenant)
  local running = finite(redis.call('HGET', P .. 'running', tenant), 0)
  local served = tonumber(redis.call('ZSCORE', P .. 'served', tenant) or '0')
  return string.format('%.0f', running * 1099511627776 + served)
end

local function update_turn(tenant)
  local places = redis.call('SMEMBERS', P .. 'places:' .. tenant)
  if #places == 0 then return end
  local score = turn_of(tenant)
  for _, key in ipairs(places) do redis.call('ZADD', key, 'XX', score, tenant) end
end

local function enqueue(job_id, queue, priority)
  local tenant, created = tenant_of(job_id), finite(get('created', job_id), now)
  priority = priority or finite(get('priority', job_id), 0)
  if not redis.call('ZSCORE', tenants_key(queue, priority), tenant) then
    redis.call('SADD', P .. 'queues', queue)
    redis.call('ZADD', priorities_key(queue), priority, priority)
    redis.call('ZADD', tenants_key(queue, priority), turn_of(tenant), tenant)
    redis.call('SADD', P .. 'places:' .. tenant, tenants_key(queue, priority))
  end
  redis.call('ZADD', jobs_key(queue, priority, tenant), created, job_id)
  redis.call('ZADD', all_key(queue), created, job_id)
  put(job_id, 'queue', queue, 'level', priority)
end

local function remove(job_id, queue, priority, tenant)
  redis.call('ZREM', all_key(queue), job_id)
  redis.call('ZREM', jobs_key(queue, priority, tenant), job_id)
  if redis.call('EXISTS', jobs_key(queue, priority, tenant)) == 1 then return end
  redis.call('ZREM', tenants_key(queue, priority), tenant)
  redis.call('SREM', P .. 'places:' .. tenant, tenants_key(queue, priority))
  if redis.call('EXISTS', tenants_key(queue, priority)) == 1 then return end
  redis.call('ZREM', priorities_key(queue), priority)
  if redis.call('EXISTS', priorities_key(queue)) == 1 then return end
  redis.call('SREM', P .. 'queues', queue)
  redis.call('HDEL', P .. 'picks', queue)
end

local function dequeue(job_id)
  local queue = get('queue', job_id)
  if queue == '' then return end
  remove(job_id, queue, get('level', job_id), tenant_of(job_id))
  put(job_id, 'queue', '', 'level', '')
end

-- Return the next job of a queue, and whether it was chosen by its age. The job stays in the queue.
local function pick(queue)
  local priority, oldest = redis.call('ZREVRANGE', priorities_key(queue), 0, 0)[1], nil
  if priority and redis.call('HINCRBY', P .. 'picks', queue, 1) % BY_AGE == 0 then
    oldest = redis.call('ZRANGE', all_key(queue), 0, 0)[1]
  end
  if oldest and get('state', oldest) == 'queued' then return oldest, true end
  while priority do
    local tenant = redis.call('ZRANGE', tenants_key(queue, priority), 0, 0)[1] or ''
    local job_id = redis.call('ZRANGE', jobs_key(queue, priority, tenant), 0, 0)[1] or ''
    if get('state', job_id) == 'queued' then return job_id, false end
    remove(job_id, queue, priority, tenant)  -- an administrator deleted the record by hand
    priority = redis.call('ZREVRANGE', priorities_key(queue), 0, 0)[1]
  end
end

-- Return the limits in which the job takes a slot.
local function limits_of(job_id)
  local found = {}
  for limit in string.gmatch(get('uses', job_id), '[^\n]+') do found[#found + 1] = limit end
  local resource = get('resource', job_id)
  if resource ~= '' then found[#found + 1] = 'resource:' .. resource end
  return found
end

local function free_slots(limit)
  local kind = string.match(limit, '^%a+')
  local max = kind == 'resource' and 1 or LIMITS[kind] or 0
  return max == 0 and math.huge or max - redis.call('SCARD', slots_key(limit))
end

-- Move the next job that waits at a limit back to the queue of its lane. Return false if no job waits.
local function wake_next(limit)
  local job_id, aged = pick(limit)
  if not job_id then return false end
  dequeue(job_id)
  enqueue(job_id, lane_queue(job_id), aged and AGED or nil)
  put(job_id, 'ready', text(now))
  to_wake[#to_wake + 1] = job_id
  return true
end

-- Return the first limit without a free slot for the job, or nil.
local function exhausted_limit(job_id)
  for _, limit in ipairs(limits_of(job_id)) do
    if free_slots(limit) <= 0 then return limit end
  end
end

-- Let the job wait at that limit. A job that waits at one of the other limits may run instead.
local function park(job_id, limit)
  if get('queue', job_id) == limit then return end
  dequeue(job_id)
  enqueue(job_id, limit)
  for _, other in ipairs(limits_of(job_id)) do
    if other ~= limit and free_slots(other) > 0 then wake_next(other) end
  end
end

-- Take the job off its queue, and take a slot of each of its limits.
local function take_slots(job_id)
  local tenant = tenant_of(job_id)
  dequeue(job_id)
  for _, limit in ipairs(limits_of(job_id)) do redis.call('SADD', slots_key(limit), job_id) end
  redis.call('HINCRBY', P .. 'running', tenant, 1)
  local seq = redis.call('INCR', P .. 'seq')
  redis.call('ZADD', P .. 'served', seq, tenant)
  if seq % 100 == 0 then redis.call('ZREMRANGEBYRANK', P .. 'served', 0, -REMEMBERED - 1) end
  update_turn(tenant)
end

local function release_slots(job_id)
  local tenant = tenant_of(job_id)
  for _, limit in ipairs(limits_of(job_id)) do
    redis.call('SREM', slots_key(limit), job_id)
    wake_next(limit)
  end
  if redis.call('HINCRBY', P .. 'running', tenant, -1) <= 0 then redis.call('HDEL', P .. 'running', tenant) end
  update_turn(tenant)
end

local function set_limits(store, source, account)
  LIMITS = { store = tonumber(store), source = tonumber(source), account = tonumber(account) }
end

-- Correct a limit after a lost step:
--   the settings raised the limit,
--   a job that no longer runs has a slot,
--   a job was woken, but did not take its slot.
local function repair_limit(limit)
  for _, job_id in ipairs(redis.call('SMEMBERS', slots_key(limit))) do
    if get('state', job_id) ~= 'running' then redis.call('SREM', slots_key(limit), job_id) end
  end
  for _ = 1, math.min(100, free_slots(limit)) do
    if not wake_next(limit) then return end
  end
end
