"""Every change of a record, as Lua: the broker runs one script at a time, by its own clock.

Keys, all below ``<prefix>ssvm.ledger:``; those of the queues are in ledger/queueing.py

    job:<id>        hash, the record of a job that waits or runs; attempt N is the field aN, JSON
    ended:<id>      text, the record of one that has ended: its attempts and record.KEPT, with NULs between them
    in:<state> <zone> <lane>    ids by time of creation
    due             queued ids that wait for their not_before, by it
    claims          running ids by the time at which their claims expire
    ended           ended ids by the time of their end
    events          stream of the changes of states; see ledger/events.py
    callbacks       ids with a callback to send, by the time of the next try
    counts          hash: how many jobs, by "state zone lane"
    endings         hash: how many jobs ever ended, by "job lane zone state error-class"
    moved           hash: bytes that ended jobs have moved, by "job zone"
    parts:<id>      set: the jobs that were run as parts of that one
    reaper          hash: when the last round was, until when running jobs are spared

The keys are made in the scripts, so the broker must be one server (with replicas, if you like), not a cluster;
Celery asks for the same.
"""

from __future__ import annotations

from .connection import ALLOW_OOM, READS
from .queueing import QUEUES
from .reaping import EXPIRE, REAP  # noqa: F401 - all_scripts finds them
from .record import KEPT

#: Before every script. ARGV[1] is the key prefix, ARGV[2] mostly the job id.
_PRELUDE = (
    f"local KEPT = {{ {', '.join(map(repr, KEPT))} }}"
    """
local P, id = ARGV[1], ARGV[2]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local function text(number) return string.format('%.6f', number) end
local function job(which) return P .. 'job:' .. which end
local function ended(which) return P .. 'ended:' .. which end

-- Of a job that has ended all is one text: a field of a hash costs 40 bytes beside its name and what it holds. JSON has
-- no NUL, so that nothing must be escaped.
local function packed(fields)
  local kept = { fields.attempts or '' }
  for number = 1, tonumber(kept[1]) or 0 do kept[#kept + 1] = fields['a' .. number] or '' end
  for _, name in ipairs(KEPT) do kept[#kept + 1] = string.gsub(fields[name] or '', '%z', '') end
  return table.concat(kept, '\\0')
end
local function spread(which, text)
  local values, names = {}, { 'attempts' }
  for value in string.gmatch(text .. '\\0', '(%Z*)%z') do values[#values + 1] = value end
  for number = 1, tonumber(values[1]) or 0 do names[#names + 1] = 'a' .. number end
  for _, name in ipairs(KEPT) do names[#names + 1] = name end
  local fields = { job_id = which }
  for at, name in ipairs(names) do fields[name] = values[at] end
  return fields
end

-- A script reads a record once and writes it once: most of what a script costs is its calls.
local records, changes, unpacked = {}, {}, {}
local function record(which)
  if not records[which] then
    local flat, fields = redis.call('HGETALL', job(which)), {}
    for at = 1, #flat, 2 do fields[flat[at]] = flat[at + 1] end
    unpacked[which] = #flat == 0 and redis.call('GET', ended(which))
    records[which] = unpacked[which] and spread(which, unpacked[which]) or fields
  end
  return records[which]
end
local function get(field, which) return record(which or id)[field] or '' end
-- Pairs of a field and its value; '' takes the field away.
local function put(which, ...)
  local fields, changed = record(which), changes[which] or { updated = text(now) }
  fields.updated = changed.updated
  for at = 1, select('#', ...), 2 do
    local field, value = select(at, ...), tostring(select(at + 1, ...))
    fields[field], changed[field] = value, value
  end
  changes[which] = changed
end
local function add(which, field, by)
  local value = (tonumber(get(field, which)) or 0) + by
  put(which, field, value)
  return value
end
local function write(which, changed)
  local set, gone = {}, {}
  for field, value in pairs(changed) do
    if value == '' then
      gone[#gone + 1] = field
    else
      set[#set + 1], set[#set + 2] = field, value
    end
  end
  redis.call('HSET', job(which), unpack(set))
  if #gone > 0 then redis.call('HDEL', job(which), unpack(gone)) end
end
local function write_all()
  for which, changed in pairs(changes) do
    local state = get('state', which)
    if state == 'succeeded' or state == 'failed' or state == 'cancelled' then
      if not unpacked[which] then redis.call('DEL', job(which)) end
      redis.call('SET', ended(which), packed(record(which)))
    else
      if unpacked[which] then redis.call('DEL', ended(which)) end
      write(which, unpacked[which] and record(which) or changed)
    end
  end
end

local function count(which, state, by)
  if state == '' then return end
  -- What is held needs no place of a worker: it runs within another job, or a command.
  local lane = (state == 'running' and get('held', which) == '1') and 'held' or get('lane', which)
  redis.call('HINCRBY', P .. 'counts', state .. ' ' .. get('zone', which) .. ' ' .. lane, by)
end

local function index(which, state)
  return P .. 'in:' .. state .. ' ' .. get('zone', which) .. ' ' .. get('lane', which)
end

local function move(which, to)
  local from = get('state', which)
  if from ~= '' then redis.call('ZREM', index(which, from), which) end
  count(which, from, -1)
  count(which, to, 1)
  redis.call('ZADD', index(which, to), get('created', which), which)
  put(which, 'state', to)
end

-- The number of the attempt is the claim's fencing token.
local function holds(token)
  return get('state') == 'running' and get('attempts') == token
end

"""
    + QUEUES
    + """
-- For whoever listens; an outcome is JSON.
local function tell(which, outcome)
  redis.call('XADD', P .. 'events', 'MAXLEN', '~', 50000, '*', 'job_id', which, 'job', get('job', which),
             'zone', get('zone', which), 'lane', get('lane', which), 'state', get('state', which),
             'attempt', get('attempts', which), 'at', text(now), 'outcome', outcome)
end

local function field_of(json, name)
  local ok, value = pcall(cjson.decode, json)
  return ok and type(value) == 'table' and value[name] or nil
end

-- A queued job is either in a queue, or waits for its time.
local function leave(which)
  if get('not_before', which) ~= '' then redis.call('ZREM', P .. 'due', which) end
  dequeue(which)
end

-- Due now or later; whoever makes it so rings, or the reaper does when no message waits in that lane.
local function queue(which, delay)
  local at, was = text(now + delay), get('state', which)
  if was == 'queued' then leave(which) end
  move(which, 'queued')
  if tonumber(delay) > 0 then
    put(which, 'not_before', at)
    redis.call('ZADD', P .. 'due', at, which)
  else
    put(which, 'not_before', '', 'ready', text(now))
    enqueue(which, lane_of(which))
  end
  if was ~= 'queued' then tell(which, '') end
end

local function begin(which, worker, host, claim_s, held)
  run(which)
  local number = add(which, 'attempts', 1)
  add(which, 'tries', 1)
  put(which, 'held', held or '')
  move(which, 'running')
  local by = get('retried_by', which)
  local attempt = cjson.encode({ worker = worker, host = host, started = text(now), by = by ~= '' and by or nil })
  if number > 20 then put(which, 'a' .. number - 20, '') end  -- a record has the last twenty
  put(which, 'a' .. number, attempt, 'retried_by', '', 'progress', '', 'ready', '', 'not_before', '')
  put(which, 'handed', '1')  -- until somebody begins: the answer may not arrive, or its process not start
  redis.call('ZADD', P .. 'claims', text(now + claim_s), which)
  tell(which, '')
  return { which, number, number, get('job', which) }
end

-- The attempt is over; the claim, the resource and the slots are free.
local function let_go(which, error)
  local field = 'a' .. get('attempts', which)
  local attempt = cjson.decode(get(field, which))
  attempt.ended, attempt.error = text(now), error ~= '' and error or nil
  local moved = field_of(get('progress', which), 'moved')
  if moved then attempt.bytes = string.format('%.0f', moved) end
  put(which, field, cjson.encode(attempt))
  if get('handed', which) == '1' then add(which, 'tries', -1) end  -- with which nobody began costs none
  put(which, 'handed', '')
  redis.call('ZREM', P .. 'claims', which)
  run_no_more(which)
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
  if get('state', which) == 'queued' then leave(which) end
  move(which, state)
  put(which, field, value, 'ending', '')
  redis.call('ZADD', P .. 'ended', text(now), which)
  if get('callback_url', which) ~= '' then
    put(which, 'callback_state', 'pending', 'callback_tries', '0', 'callback_error', '')
    redis.call('ZADD', P .. 'callbacks', text(now), which)
  end
  account(which)
  tell(which, state == 'succeeded' and get('result', which) or get('error', which))
end
"""
)

_ENDING = """
local answer = act()
write_all()
return answer
"""

#: ARGV: state, error, field, value, … -> when it was created, or '' if it was known.
SUBMIT = """
if get('state') ~= '' then return '' end
put(id, 'job_id', id, 'created', text(now), unpack(ARGV, 5))
if ARGV[3] == 'failed' then conclude(id, 'failed', 'error', ARGV[4]) else queue(id, 0) end
return text(now)
"""

#: ARGV: worker, host, claim_s, limits, '1' if whoever submits it runs it -> id, token, number, job; nothing if it is
#: not there to be run now.
CLAIM = """
set_limits(ARGV[6], ARGV[7], ARGV[8])
if get('state') ~= 'queued' or (tonumber(get('not_before')) or 0) > now then return {} end
local limit = obstacle(id)
if limit then
  park(id, limit)
  return {}
end
return begin(id, ARGV[3], ARGV[4], ARGV[5], ARGV[9])
"""

#: ARGV[2..]: zone and lane, worker, host, claim_s, limits -> the same of the next job of that lane; '' to ask again.
NEXT = """
set_limits(ARGV[6], ARGV[7], ARGV[8])
local lane = 'lane:' .. id
for _ = 1, 100 do
  local which = pick(lane)
  if not which then return {} end
  local limit = obstacle(which)
  if not limit then return begin(which, ARGV[3], ARGV[4], ARGV[5]) end
  park(which, limit)
end
return { '' }
"""

#: ARGV: token, claim_s -> 1 if the claim stands, and the record.
BEGIN = """
if not holds(ARGV[3]) then return {} end
redis.call('ZADD', P .. 'claims', text(now + ARGV[4]), id)
put(id, 'handed', '')
local flat = {}
for field, value in pairs(record(id)) do flat[#flat + 1], flat[#flat + 2] = field, value end
return flat
"""

#: ARGV: token, claim_s, progress or '' -> -1 fenced, 0 go on, 1 cancel.
BEAT = """
if not holds(ARGV[3]) then return -1 end
redis.call('ZADD', P .. 'claims', text(now + ARGV[4]), id)
if ARGV[5] ~= '' then put(id, 'progress', ARGV[5]) end
if get('cancel') == '1' then return 1 end
return 0
"""

#: ARGV: token, state, result, error, progress; each of the three may be '' -> nil when fenced, else the ids to ring.
#: Safe to repeat.
FINISH = """
if get('attempts') == ARGV[3] and get('state') == ARGV[4] then return {} end
if not holds(ARGV[3]) then return false end
if ARGV[7] ~= '' then put(id, 'progress', ARGV[7]) end
let_go(id, ARGV[6])
put(id, 'result', ARGV[5])
conclude(id, ARGV[4], 'error', ARGV[6])
return freed
"""

#: ARGV: token, error, delay in seconds, 1 if the attempt counts, progress or '' -> as FINISH. Safe to repeat.
RELEASE = """
if get('attempts') == ARGV[3] and get('state') == 'queued' then return {} end
if not holds(ARGV[3]) then return false end
if ARGV[7] ~= '' then put(id, 'progress', ARGV[7]) end
let_go(id, ARGV[4])
if ARGV[6] == '0' then add(id, 'tries', -1) end
put(id, 'error', ARGV[4])
if get('cancel') == '1' then
  put(id, 'ending', 'cancelled')
  queue(id, 0)
else
  queue(id, ARGV[5])
end
return freed
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
  put(id, 'ready', '0')  -- nobody rings for it, so the reaper must not wait
end
return state
"""

#: ARGV[2]: a job id, or '' for any; ARGV[3] seconds for which nobody else gets it -> an id, or ''.
TAKE_CALLBACK = """
local due = ARGV[2] ~= '' and { ARGV[2] }
  or redis.call('ZRANGEBYSCORE', P .. 'callbacks', '-inf', text(now), 'LIMIT', 0, 100)
for _, which in ipairs(due) do
  local at = tonumber(redis.call('ZSCORE', P .. 'callbacks', which) or nil)
  if get('state', which) == '' then
    redis.call('ZREM', P .. 'callbacks', which)  -- somebody has deleted its record by hand
  elseif at and at <= now then
    redis.call('ZADD', P .. 'callbacks', text(now + ARGV[3]), which)
    return which
  end
end
return ''
"""

#: ARGV: state (pending, delivered, failed), error, seconds until the next try.
CALLBACK = """
if get('callback_state') ~= 'pending' then return 0 end
add(id, 'callback_tries', 1)
put(id, 'callback_state', ARGV[3], 'callback_error', ARGV[4])
if ARGV[3] == 'pending' then return redis.call('ZADD', P .. 'callbacks', text(now + ARGV[5]), id) end
return redis.call('ZREM', P .. 'callbacks', id)
"""


#: Before a script that a full broker refuses before it has changed anything.
_STRICT = "#!lua\n"

#: ARGV[2..]: ids -> of each the fields of its hash, and its text.
_RECORDS = """
local rows = {}
for at = 2, #ARGV do
  rows[#rows + 1] = redis.call('HGETALL', ARGV[1] .. 'job:' .. ARGV[at])
  rows[#rows + 1] = redis.call('GET', ARGV[1] .. 'ended:' .. ARGV[at])
end
return rows
"""

#: ARGV[2..]: the last place, or -1; indexes -> of each ids and times of creation, the newest first.
_NEWEST = """
local rows = {}
for at = 3, #ARGV do
  rows[#rows + 1] = redis.call('ZREVRANGE', ARGV[1] .. ARGV[at], 0, ARGV[2], 'WITHSCORES')
end
return rows
"""


def all_scripts() -> dict[str, str]:
    """Every script by its name, with the functions that all of them share.

    A broker that is full refuses new jobs only: what it has can be listed, run, ended and removed.
    """
    others = ("KEPT", "QUEUES", "ALLOW_OOM", "READS")
    bodies = {name: text for name, text in globals().items() if name.isupper() and name not in others}
    changing = {
        name: f"{_STRICT if name == 'SUBMIT' else ALLOW_OOM}{_PRELUDE}local function act()\n{body}end\n{_ENDING}"
        for name, body in bodies.items()
        if not name.startswith("_")
    }
    return changing | {"RECORDS": READS + _RECORDS, "NEWEST": READS + _NEWEST}
