#!lua flags=allow-oom
-- include: clock records queues job_states
-- Renew a claim, and store the progress.
-- ARGV: prefix, id, token, claim_s, progress or '' -> -1 claim lost, 0 continue, 1 cancel requested.

return transaction(function()
  if not holds_claim(ARGV[3]) then return -1 end
  redis.call('ZADD', P .. 'claims', text(now + ARGV[4]), id)
  if ARGV[5] ~= '' then put(id, 'progress', ARGV[5]) end
  if get('cancel') == '1' then return 1 end
  return 0
end)
