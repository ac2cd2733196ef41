"""The rule by which a bucket itself drops the parts of uploads that nobody ends, should clean-up never run again."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from .errors import code_of

if TYPE_CHECKING:
    from .client import Bucket

#: Longer than any transfer, and than a job may wait for its next attempt.
_DAYS = 7
_ACTION = "AbortIncompleteMultipartUpload"


def orphan_rule(bucket: Bucket, root: str) -> str | None:
    """Empty where the bucket has such a rule for *root*; else the command that makes one, and keeps the other rules.

    None where the server does not tell its rules, so that none can be added to them.
    """
    try:
        rules: list[Any] = list(bucket.client.get_bucket_lifecycle_configuration(Bucket=bucket.name).get("Rules", []))
    except ClientError as error:
        if code_of(error)[0] != "NoSuchLifecycleConfiguration":
            return None
        rules = []
    if any(each.get("Status") == "Enabled" and _ACTION in each and root.startswith(_prefix(each)) for each in rules):
        return ""
    ours = {
        "ID": "abandoned-uploads",
        "Status": "Enabled",
        "Filter": {"Prefix": root},
        _ACTION: {"DaysAfterInitiation": _DAYS},
    }
    endpoint = ["--endpoint-url", bucket.settings.endpoint] if bucket.settings.endpoint else []
    kept = [each for each in rules if each.get("ID") != ours["ID"]]
    command = ["aws", "s3api", "put-bucket-lifecycle-configuration", *endpoint, "--bucket", bucket.name]
    return shlex.join([*command, "--lifecycle-configuration", json.dumps({"Rules": [*kept, ours]}, default=str)])


def _prefix(rule: Any) -> str:
    """What keys begin with to which the rule applies; one that asks for more than a prefix applies to none of ours."""
    given = rule.get("Filter", rule)
    return str(given.get("Prefix", "")) if set(given) <= {"Prefix"} or given is rule else "\0"
