"""What keeps tenants' prefix caches apart."""

from __future__ import annotations

import hashlib
import hmac
import secrets


def cache_salt(cluster_secret: str, tenant: str) -> str:
    """HMAC-SHA256 of the tenant, hex: no tenant can guess another's. Without a secret it is this process's own."""
    key = cluster_secret.encode() or secrets.token_bytes(32)
    return hmac.new(key, tenant.encode(), hashlib.sha256).hexdigest()
