-- Read and write the records of jobs. ARGV[1] is the key prefix. ARGV[2] is a job id in most scripts.
--
-- Keys below "<prefix>ssvm.ledger:" (queues.lua lists the keys of the queues):
--   job:<id>        hash: the record of a queued or running job. Attempt N is the field aN, as JSON.
--   ended:<id>      string: the record of an ended job. Its parts are separated by NUL: the number of attempts,
--                   each attempt, and the ENDED_FIELDS.
--   in:<state> <zone> <lane>    sorted set: ids by time of creation
--   due             sorted set: queued ids that wait for their not_before, by that time
--   claims          sorted set: running ids by the time at which their claims expire
--   ended           sorted set: ended ids by the time of their end
--   events          stream: changes of states; see events.py
--   callbacks       sorted set: ids with a callback to send, by the time of the next try
--   counts          hash: number of jobs by "state zone lane"
--   endings         hash: number of jobs that ever ended, by "job lane zone state error-class"
--   moved           hash: bytes that ended attempts have moved, by "job zone"
--   parts:<id>      set: the jobs that ran as parts of that job
--   reaper          hash: time of the last round (last); time until which running jobs are spared (spare)
--
-- Scripts build key names, so the broker must be one server, with or without replicas. It cannot be a cluster.
-- Celery has the same requirement.

-- Must equal ENDED_FIELDS in record.py. New fields are appended, because older records end earlier.
local ENDED_FIELDS = {
  'job', 'zone', 'lane', 'state', 'request', 'resource', 'callback_url', 'priority', 'account', 'uses',
  'traceparent', 'created', 'updated', 'not_before', 'tries', 'progress', 'result', 'error', 'cancel',
  'cancelled_by', 'callback_state', 'callback_tries', 'callback_error',
}

local P, id = ARGV[1], ARGV[2]
local function job_key(job_id) return P .. 'job:' .. job_id end
local function ended_key(job_id) return P .. 'ended:' .. job_id end

-- An ended record is one string, because each field of a hash costs 40 bytes beside its name and value.
-- JSON contains no NUL, so nothing needs an escape.
local function pack_record(fields)
  -- More attempts come only from a damaged record, and would block the broker.
  local values = { tonumber(fields.attempts) and fields.attempts or '' }
  if (tonumber(values[1]) or 0) > 10000 then values[1] = '10000' end
  for number = 1, tonumber(values[1]) or 0 do values[#values + 1] = fields['a' .. number] or '' end
  for _, name in ipairs(ENDED_FIELDS) do values[#values + 1] = string.gsub(fields[name] or '', '%z', '') end
  return table.concat(values, '\0')
end

local function unpack_record(job_id, packed)
  local values, names = {}, { 'attempts' }
  for value in string.gmatch(packed .. '\0', '(%Z*)%z') do values[#values + 1] = value end
  for number = 1, math.min(tonumber(values[1]) or 0, #values) do names[#names + 1] = 'a' .. number end
  for _, name in ipairs(ENDED_FIELDS) do names[#names + 1] = name end
  local fields = { job_id = job_id }
  for position, name in ipairs(names) do fields[name] = values[position] end
  return fields
end

-- No record may end a script that reads others too: an administrator may delete or change one by hand.
-- A script reads each record once and writes it once, because calls are most of a script's cost.
-- records: fields by job id. changes: changed fields by job id. packed_records: the strings of ended jobs.
local records, changes, packed_records = {}, {}, {}

local function record(job_id)
  if not records[job_id] then
    -- pcall: a key of another type counts as no record, and must not end the scripts that read other records too.
    local flat, fields, packed = redis.pcall('HGETALL', job_key(job_id)), {}, false
    for at = 1, #flat, 2 do fields[flat[at]] = flat[at + 1] end
    if #flat == 0 then packed = redis.pcall('GET', ended_key(job_id)) end
    packed_records[job_id] = type(packed) == 'string' and packed
    records[job_id] = packed_records[job_id] and unpack_record(job_id, packed_records[job_id]) or fields
  end
  return records[job_id]
end

-- Return a field of a record, or '' if it is missing. The default job is ARGV[2].
local function get(field, job_id) return record(job_id or id)[field] or '' end

-- Set fields of a record, given as pairs of name and value. The value '' removes the field.
local function put(job_id, ...)
  local fields, changed = record(job_id), changes[job_id] or { updated = text(now) }
  fields.updated = changed.updated
  for at = 1, select('#', ...), 2 do
    local field, value = select(at, ...), tostring(select(at + 1, ...))
    fields[field], changed[field] = value, value
  end
  changes[job_id] = changed
end

local function add(job_id, field, by)
  local value = (tonumber(get(field, job_id)) or 0) + by
  put(job_id, field, value)
  return value
end

local function write_hash(job_id, changed)
  local set, removed = {}, {}
  for field, value in pairs(changed) do
    if value == '' then
      removed[#removed + 1] = field
    else
      set[#set + 1], set[#set + 2] = field, value
    end
  end
  redis.call('HSET', job_key(job_id), unpack(set))
  if #removed > 0 then redis.call('HDEL', job_key(job_id), unpack(removed)) end
end

local function write_all()
  for job_id, changed in pairs(changes) do
    local state = get('state', job_id)
    if state == 'succeeded' or state == 'failed' or state == 'cancelled' then
      if not packed_records[job_id] then redis.call('DEL', job_key(job_id)) end
      redis.call('SET', ended_key(job_id), pack_record(record(job_id)))
    else
      if packed_records[job_id] then redis.call('DEL', ended_key(job_id)) end
      write_hash(job_id, packed_records[job_id] and record(job_id) or changed)
    end
  end
end

-- Run the body of a script, write the records that it changed, and return its result.
local function transaction(body)
  local result = body()
  write_all()
  return result
end

local function count_state(job_id, state, by)
  if state == '' then return end
  -- A held job runs inside another job or a command, so it takes no place of a worker.
  local lane = (state == 'running' and get('held', job_id) == '1') and 'held' or get('lane', job_id)
  redis.pcall('HINCRBY', P .. 'counts', state .. ' ' .. get('zone', job_id) .. ' ' .. lane, by)
end

local function index_key(job_id, state)
  return P .. 'in:' .. state .. ' ' .. get('zone', job_id) .. ' ' .. get('lane', job_id)
end

local function set_state(job_id, state)
  local previous = get('state', job_id)
  if previous ~= '' then redis.call('ZREM', index_key(job_id, previous), job_id) end
  count_state(job_id, previous, -1)
  count_state(job_id, state, 1)
  redis.call('ZADD', index_key(job_id, state), finite(get('created', job_id), now), job_id)
  put(job_id, 'state', state)
end

-- Check the claim of the job ARGV[2]. The number of the attempt is the fencing token.
local function holds_claim(token)
  return get('state') == 'running' and get('attempts') == token
end
