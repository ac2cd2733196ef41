#!lua
-- include: clock records queues job_states
-- Write a new job: queued, or failed with an error.
-- ARGV: prefix, id, state, error, field, value, … -> the time of creation; '' if the job exists.
-- A broker without memory refuses this script, and changes nothing.

return transaction(function()
  if get('state') ~= '' then return '' end
  put(id, 'job_id', id, 'created', text(now), unpack(ARGV, 5))
  if ARGV[3] == 'failed' then end_job(id, 'failed', 'error', ARGV[4]) else queue_job(id, 0) end
  return text(now)
end)
