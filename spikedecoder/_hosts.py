"""What a server calls itself that only this machine can reach."""

# What requests may name as their host. A web page elsewhere, whose own name leads to 127.0.0.1 while it is
# open (DNS rebinding), is to the browser of one origin with a server there; but the browser still sends
# the page's name. "[": all that Starlette before 1.7 sees of an IPv6 address, which no page's name can be.
LOCAL = ("localhost", "127.0.0.1", "[::1]", "[")
