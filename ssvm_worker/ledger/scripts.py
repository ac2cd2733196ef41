"""Every change of a record, as Lua: the broker runs one script at a time, by its own clock.

Keys, all below ``<prefix>ledger:``

    job:<id>        hash, the record; attempt N has the fields aN:worker, aN:started, aN:ended, aN:error, aN:by
    jobs            ids by time of creation; state:<state> the same by state
    due             queued ids by the time at which the reaper looks at them
    claims          running ids by the time at which their claims expire
    ended           ended ids by the time of their end
    events          stream of the changes of states; see ledger/events.py
    callbacks       ids with a callback to send, by the time of the next try
    counts          hash: how many jobs, by "state zone lane"
    endings         hash: how many jobs ever ended, by "job lane zone state error-class"
    moved           hash: bytes that ended jobs have moved, by "job zone"
    parts:<id>      set: the jobs that were run as parts of that one
    holder:<what>   the job that holds a resource; means nothing unless that job is running
    reaper          hash: when the last round was, until when running jobs are spared

The keys are made in the scripts, so the broker must be one server (with replicas, if you like), not a cluster;
Celery asks for the same.
"""

from __future__ import annotations

#: Before every script. ARGV[1] is the key prefix, ARGV[2] mostly the job id.
_PRELUDE = """
local P, id = ARGV[1], ARGV[2]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local function text(number) return string.format('%.6f', number) end
local function job(which) return P .. 'job:' .. (which or id) end
local function get(field, which) return redis.call('HGET', job(which), field) or '' end
local function put(which, ...) redis.call('HSET', job(which), 'updated', text(now), ...) end

local function count(which, state, by)
  if state == '' then return end
  -- What is held needs no place of a worker: it runs within another job, or a command.
  local lane = (state == 'running' and get('held', which) == '1') and 'held' or get('lane', which)
  redis.call('HINCRBY', P .. 'counts', state .. ' ' .. get('zone', which) .. ' ' .. lane, by)
end

local function move(which, to)
  local from = get('state', which)
  if from ~= '' then redis.call('ZREM', P .. 'state:' .. from, which) end
  count(which, from, -1)
  count(which, to, 1)
  redis.call('ZADD', P .. 'state:' .. to, get('created', which), which)
  put(which, 'state', to)
end

local function holds(token)
  return get('state') == 'running' and get('token') == token
end

-- The attempt is over, the claim and the resource are free.
local function let_go(which, error)
  local number = get('attempts', which)
  put(which, 'a' .. number .. ':ended', text(now), 'a' .. number .. ':error', error)
  redis.call('ZREM', P .. 'claims', which)
  local holder = P .. 'holder:' .. get('resource', which)
  if redis.call('GET', holder) == which then redis.call('DEL', holder) end
end

-- For whoever listens; an outcome is JSON.
local function tell(which, outcome)
  redis.call('XADD', P .. 'events', 'MAXLEN', '~', 50000, '*', 'job_id', which, 'job', get('job', which),
             'zone', get('zone', which), 'lane', get('lane', which), 'state', get('state', which),
             'attempt', get('attempts', which), 'at', text(now), 'outcome', outcome)
end

local function queue(which, delay)
  local at, was = text(now + delay), get('state', which)
  move(which, 'queued')
  put(which, 'queued', text(now), 'rung', '0', 'not_before', tonumber(delay) > 0 and at or '0')
  redis.call('ZADD', P .. 'due', at, which)
  if was ~= 'queued' then tell(which, '') end
end

local function field_of(json, name)
  local ok, value = pcall(cjson.decode, json)
  return ok and type(value) == 'table' and value[name] or nil
end

-- What metrics are made of: these only grow.
local function account(which)
  local kind = field_of(get('error', which), 'error') or '-'
  local what = get('job', which) .. ' ' .. get('lane', which) .. ' ' .. get('zone', which)
  redis.call('HINCRBY', P .. 'endings', what .. ' ' .. get('state', which) .. ' ' .. kind, 1)
  local bytes = tonumber(field_of(get('progress', which), 'bytes')) or 0
  redis.call('HINCRBY', P .. 'moved', get('job', which) .. ' ' .. get('zone', which), string.format('%.0f', bytes))
end

local function conclude(which, state, field, value)
  move(which, state)
  put(which, field, value, 'ending', '')
  redis.call('ZREM', P .. 'due', which)
  redis.call('ZADD', P .. 'ended', text(now), which)
  if get('callback_url', which) ~= '' then
    put(which, 'callback_state', 'pending', 'callback_tries', '0', 'callback_error', '')
    redis.call('ZADD', P .. 'callbacks', text(now), which)
  end
  account(which)
  tell(which, state == 'succeeded' and get('result', which) or get('error', which))
end
"""

#: ARGV: state, error, seconds until the reaper looks, field, value, … -> the state it had before, or ''.
SUBMIT = """
local had = get('state')
if had ~= '' then return had end
redis.call('HSET', job(), 'job_id', id, 'created', text(now), 'updated', text(now), unpack(ARGV, 6))
redis.call('ZADD', P .. 'jobs', text(now), id)
if ARGV[3] == 'failed' then
  conclude(id, 'failed', 'error', ARGV[4])
else
  queue(id, 0)
  redis.call('ZADD', P .. 'due', text(now + ARGV[5]), id)
end
return ''
"""

#: ARGV: worker, claim_s, seconds to wait for a busy resource, 1 if whoever submits it runs it
#: -> token, or 0 if there is nothing to run now.
CLAIM = """
if get('state') ~= 'queued' or tonumber(get('not_before')) > now then return 0 end
local resource = get('resource')
if resource ~= '' then
  local other = redis.call('GET', P .. 'holder:' .. resource)
  if other and other ~= id and get('state', other) == 'running' then
    queue(id, ARGV[5])
    return 0
  end
  redis.call('SET', P .. 'holder:' .. resource, id)
end
local number = redis.call('HINCRBY', job(), 'attempts', 1)
redis.call('HINCRBY', job(), 'tries', 1)
put(id, 'held', ARGV[6])
move(id, 'running')
put(id, 'a' .. number .. ':worker', ARGV[3], 'a' .. number .. ':started', text(now),
    'a' .. number .. ':by', get('retried_by'), 'retried_by', '', 'progress', '', 'not_before', '0')
redis.call('ZREM', P .. 'due', id)
redis.call('ZADD', P .. 'claims', text(now + ARGV[4]), id)
tell(id, '')
return redis.call('HINCRBY', job(), 'token', 1)
"""

#: ARGV: token, claim_s, progress or '' -> -1 fenced, 0 go on, 1 cancel.
BEAT = """
if not holds(ARGV[3]) then return -1 end
redis.call('ZADD', P .. 'claims', text(now + ARGV[4]), id)
if ARGV[5] ~= '' then put(id, 'progress', ARGV[5]) end
if get('cancel') == '1' then return 1 end
return 0
"""

#: ARGV: token, state, result, error, either may be '' -> 1, or 0 when fenced. Safe to repeat.
FINISH = """
if get('token') == ARGV[3] and get('state') == ARGV[4] then return 1 end
if not holds(ARGV[3]) then return 0 end
let_go(id, ARGV[6])
put(id, 'result', ARGV[5])
conclude(id, ARGV[4], 'error', ARGV[6])
return 1
"""

#: ARGV: token, error, delay in seconds, 1 if the attempt counts -> 1, or 0 when fenced. Safe to repeat.
RELEASE = """
if get('token') == ARGV[3] and get('state') == 'queued' then return 1 end
if not holds(ARGV[3]) then return 0 end
let_go(id, ARGV[4])
if ARGV[6] == '0' then redis.call('HINCRBY', job(), 'tries', -1) end
put(id, 'error', ARGV[4])
if get('cancel') == '1' then
  put(id, 'ending', 'cancelled')
  queue(id, 0)
else
  queue(id, ARGV[5])
end
return 1
"""

#: ARGV: by -> the state it was in; only failed and cancelled are changed.
RETRY = """
local state = get('state')
if state ~= 'failed' and state ~= 'cancelled' then return state end
redis.call('ZREM', P .. 'ended', id)
redis.call('ZREM', P .. 'callbacks', id)
put(id, 'tries', '0', 'cancel', '', 'cancelled_by', '', 'ending', '', 'error', '', 'result', '', 'progress', '',
    'retried_by', ARGV[3], 'callback_state', '')
queue(id, 0)
return state
"""

#: ARGV: by -> the state it was in; only queued and running are changed.
CANCEL = """
local state = get('state')
if state == 'queued' or state == 'running' then
  put(id, 'cancel', '1', 'cancelled_by', ARGV[3])
end
if state == 'queued' and get('attempts') == '' then
  conclude(id, 'cancelled', 'progress', '')
elseif state == 'queued' then
  put(id, 'ending', get('ending') == '' and 'cancelled' or get('ending'))
  queue(id, 0)
end
return state
"""

#: ARGV: seconds until the reaper looks again.
RUNG = """
if get('state') ~= 'queued' then return 0 end
put(id, 'rung', text(now))
return redis.call('ZADD', P .. 'due', text(now + ARGV[3]), id)
"""

#: ARGV[2..]: claim_s, every_s, max_attempts, ring_again_s, error of a lost attempt, Celery's key prefix, '1' if
#: messages go elsewhere -> ids to ring, and ids to ring if no message stands in their queue, which the caller can see.
#: A round sooner than every_s after the last one does nothing, so that any number of reapers make one.
REAP = """
local claim_s, every_s, again_s = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[5])
local last = tonumber(redis.call('HGET', P .. 'reaper', 'last') or '0')

-- What was to be at some time is that much sooner. Claims of the dead would stay for hours; the living renew theirs.
local function set_back(by)
  for _, each in ipairs(redis.call('ZRANGE', P .. 'due', 0, -1)) do
    redis.call('ZINCRBY', P .. 'due', text(-by), each)
    for _, field in ipairs({'not_before', 'queued', 'rung'}) do
      local at = tonumber(get(field, each)) or 0
      if at > 0 then redis.call('HSET', job(each), field, text(at - by)) end
    end
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
    end
  end
end

local ring, ask, empty = {}, {}, {}
for _, due in ipairs(redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', text(now), 'LIMIT', 0, 100)) do
  local lane = ARGV[7] .. 'ssvm.' .. get('zone', due) .. '.' .. get('lane', due)
  if empty[lane] == nil then empty[lane] = ARGV[8] == '' and redis.call('LLEN', lane) == 0 end
  -- Never rung for this wait: ring. Rung: its message may stand in the queue, unless that is empty; but a queue that
  -- is never empty may hide a loss, so ring at growing intervals all the same.
  local rung, since = tonumber(get('rung', due)), tonumber(get('queued', due))
  if rung == 0 or empty[lane] or now - rung > math.max(600, rung - since) then
    redis.call('HSET', job(due), 'rung', text(now))
    ring[#ring + 1] = due
  elseif ARGV[8] ~= '' then
    ask[#ask + 1] = due
  end
  redis.call('ZADD', P .. 'due', text(now + again_s), due)
end
return {ring, ask}
"""

#: ARGV[2]: keep_s -> how many records were dropped.
EXPIRE = """
local old = redis.call('ZRANGEBYSCORE', P .. 'ended', '-inf', text(now - ARGV[2]), 'LIMIT', 0, 100)
for _, each in ipairs(old) do
  redis.call('ZREM', P .. 'state:' .. get('state', each), each)
  count(each, get('state', each), -1)
  for _, index in ipairs({'jobs', 'ended', 'callbacks'}) do redis.call('ZREM', P .. index, each) end
  redis.call('DEL', job(each))
end
return #old
"""

#: ARGV[2]: a job id, or '' for any; ARGV[3] seconds for which nobody else gets it -> an id, or ''.
TAKE_CALLBACK = """
local which = ARGV[2]
if which == '' then
  which = redis.call('ZRANGEBYSCORE', P .. 'callbacks', '-inf', text(now), 'LIMIT', 0, 1)[1]
else
  local at = redis.call('ZSCORE', P .. 'callbacks', which)
  if not at or tonumber(at) > now then return '' end
end
if not which then return '' end
redis.call('ZADD', P .. 'callbacks', text(now + ARGV[3]), which)
return which
"""

#: ARGV: state (pending, delivered, failed), error, seconds until the next try.
CALLBACK = """
if get('callback_state') ~= 'pending' then return 0 end
redis.call('HINCRBY', job(), 'callback_tries', 1)
redis.call('HSET', job(), 'callback_state', ARGV[3], 'callback_error', ARGV[4])
if ARGV[3] == 'pending' then return redis.call('ZADD', P .. 'callbacks', text(now + ARGV[5]), id) end
return redis.call('ZREM', P .. 'callbacks', id)
"""


def all_scripts() -> dict[str, str]:
    """Every script by its name, with the functions that all of them share."""
    bodies = {name: value for name, value in globals().items() if name.isupper() and not name.startswith("_")}
    return {name: _PRELUDE + body for name, body in bodies.items()}
