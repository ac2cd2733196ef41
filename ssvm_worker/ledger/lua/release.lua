#!lua flags=allow-oom
-- include: clock records queues job_states
-- Queue a running job again. A cancelled job is due at once, so that a worker removes its leftovers. Safe to repeat.
-- ARGV: prefix, id, token; error or ''; delay in seconds; '1' if the attempt counts; progress or ''
--
-- -> the ids of jobs to wake; nil if the claim is lost.

return transaction(function()
  local token, error, delay, counted, progress = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
  if get('attempts') == token and get('state') == 'queued' then return {} end
  if not holds_claim(token) then return false end
  if progress ~= '' then put(id, 'progress', progress) end
  end_attempt(id, error)
  if counted == '0' then add(id, 'tries', -1) end
  put(id, 'error', error)
  if get('cancel') == '1' then
    put(id, 'ending', 'cancelled')
    queue_job(id, 0)
  else
    queue_job(id, delay)
  end
  return to_wake
end)
