#!lua flags=allow-oom
-- include: clock records queues job_states
-- End a job. Safe to repeat.
-- ARGV: prefix, id, token, state, result or '', error or '', progress or ''
-- -> the ids of jobs to wake; nil if the claim is lost.

return transaction(function()
  local token, state, result, error, progress = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
  if get('attempts') == token and get('state') == state then return {} end
  if not holds_claim(token) then return false end
  if progress ~= '' then put(id, 'progress', progress) end
  end_attempt(id, error)
  put(id, 'result', result)
  end_job(id, state, 'error', error)
  return to_wake
end)
