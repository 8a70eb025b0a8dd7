package nft

import "testing"

// Defends: bytes that somebody in the namespace wrote cannot crash the agent.
func TestMalformed(t *testing.T) {
	for _, b := range [][]byte{nil, {0}, {0, 0}, {0, 255, 'x'}, {0, 1}, {1, 1, 'x'}, {0, 1, 'x', 'y'}} {
		if got := CommentText(b); got != "" {
			t.Errorf("%v: got %q", b, got)
		}
	}
	if got := CommentText(Comment("hello")); got != "hello" {
		t.Errorf("got %q", got)
	}
	for _, b := range [][]byte{{}, {1}, {255, 255, 1, 0}, {2, 0, 1, 0, 9}} {
		_, _ = parseRule(b)
		_, _ = parseExpr(b)
	}
}
