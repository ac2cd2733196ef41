#!lua
-- include: clock records queues job_states
-- Write a new job: queued, or failed with an error. Write the value that its worker reads beside the record.
-- ARGV: prefix, id, state, error, the value's key or '', the value, its seconds, field, value, …
-- -> the time of creation; '' and the fields of the record if the job exists.
-- A broker without memory refuses this script, and changes nothing.

return transaction(function()
  if get('state') ~= '' then
    local row = { '' }
    for field, value in pairs(record(id)) do
      if value ~= '' then row[#row + 1], row[#row + 2] = field, value end
    end
    return row
  end
  put(id, 'job_id', id, 'created', text(now), unpack(ARGV, 8))
  if ARGV[5] ~= '' then redis.call('SET', ARGV[5], ARGV[6], 'EX', ARGV[7]) end
  if ARGV[3] == 'failed' then end_job(id, 'failed', 'error', ARGV[4]) else queue_job(id, 0) end
  return { text(now) }
end)
