package agent

import (
	"testing"
	"time"
)

// Timers that stand still are noticed by the wall clock, short stops together; a
// clock that is set back, or drifts, is no suspend.
func TestPace(t *testing.T) {
	begin := time.Unix(1_800_000_000, 0)
	// at is an instant by the timers, with a wall clock that is ahead by off.
	type at struct {
		timers, off time.Duration
		lag         time.Duration
	}
	for name, readings := range map[string][]at{
		"ordinary":       {{2 * time.Second, 0, 0}, {4 * time.Second, 0, 0}},
		"suspended":      {{2 * time.Second, time.Hour, time.Hour}, {4 * time.Second, time.Hour, 0}},
		"short stops":    {{2 * time.Second, 6 * time.Second, 6 * time.Second}, {4 * time.Second, 12 * time.Second, 12 * time.Second}, {6 * time.Second, 12 * time.Second, 0}},
		"set back":       {{2 * time.Second, -time.Hour, 0}, {4 * time.Second, -time.Hour, 0}},
		"back and right": {{2 * time.Second, -time.Hour, 0}, {4 * time.Second, 0, time.Hour}},
	} {
		p := &pace{wall: begin}
		for i, r := range readings {
			if got := p.lag(begin.Add(r.timers+r.off), r.timers); got != r.lag {
				t.Errorf("%s, %d: %s behind, want %s", name, i, got, r.lag)
			}
		}
	}
}
