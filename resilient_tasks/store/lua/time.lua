-- time() -> the server's time, ms, as text
-- Shows that the server runs scripts.

return string.format('%.0f', now_ms())
