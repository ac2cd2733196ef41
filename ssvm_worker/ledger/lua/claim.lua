#!lua flags=allow-oom
-- include: clock records queues job_states
-- Claim one job, if it is queued and due, and no limit is exhausted.
-- ARGV: prefix, id, worker, host, claim_s, limits (store, source, account), '1' if the submitter runs the job
-- -> {id, token, number, job}; {} if the job cannot run now.

return transaction(function()
  local worker, host, claim_s, held = ARGV[3], ARGV[4], ARGV[5], ARGV[9]
  set_limits(ARGV[6], ARGV[7], ARGV[8])
  if get('state') ~= 'queued' or finite(get('not_before'), 0) > now then return {} end
  local limit = exhausted_limit(id)
  if limit then
    park(id, limit)
    return {}
  end
  return start_attempt(id, worker, host, claim_s, held)
end)
