#!lua flags=allow-oom
-- include: clock records queues job_states
-- Claim the next job of a lane. Jobs whose limits are exhausted start to wait there.
-- ARGV: prefix, "zone lane", worker, host, claim_s, limits (store, source, account)
-- -> {id, token, number, job}; {} if no job can run; {''} after 100 parked jobs: the caller must ask again.

return transaction(function()
  local worker, host, claim_s = ARGV[3], ARGV[4], ARGV[5]
  set_limits(ARGV[6], ARGV[7], ARGV[8])
  local queue = 'lane:' .. ARGV[2]
  for _ = 1, 100 do
    local job_id = pick(queue)
    if not job_id then return {} end
    local limit = exhausted_limit(job_id)
    if not limit then return start_attempt(job_id, worker, host, claim_s) end
    park(job_id, limit)
  end
  return { '' }
end)
