#!lua flags=allow-oom
-- include: clock records queues job_states
-- Confirm that the claimed attempt has started, and renew its claim.
-- ARGV: prefix, id, token, claim_s -> the record as a list of names and values; {} if the claim is lost.

return transaction(function()
  if not holds_claim(ARGV[3]) then return {} end
  redis.call('ZADD', P .. 'claims', text(now + ARGV[4]), id)
  put(id, 'handed', '')
  local flat = {}
  for field, value in pairs(record(id)) do flat[#flat + 1], flat[#flat + 2] = field, value end
  return flat
end)
