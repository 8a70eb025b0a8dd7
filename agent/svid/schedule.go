package svid

import "time"

// Bounds of the wait between two attempts to renew.
const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 30 * time.Second
)

// rotationSpread is the longest time over which certificates are renewed when
// another root signs.
const rotationSpread = 30 * time.Second

// renewAt is the instant to renew a certificate that was obtained at the
// instant now: half of what is left of it, moved by up to a tenth either way.
// It counts from the day the certificate was obtained and not from NotBefore,
// which issuers date back. jitter is in [0,1).
func renewAt(now, notAfter time.Time, jitter float64) time.Time {
	half := notAfter.Sub(now) / 2
	return now.Round(0).Add(half + time.Duration(float64(half)*0.1*(2*jitter-1)))
}

// backoff is the wait after the given number of failures in a row (from 1).
// remaining is what is left of the certificate that is held; with one about
// to expire the waits grow short. jitter is in [0,1) and takes up to half of
// the wait away, so that a node's identities do not retry in step.
func backoff(failures int, remaining time.Duration, jitter float64) time.Duration {
	limit := maxBackoff
	if remaining > 0 {
		limit = max(minBackoff, min(limit, remaining/10))
	}
	d := minBackoff
	for i := 1; i < failures && d < limit; i++ {
		d *= 2
	}
	d = min(d, limit)
	return d - time.Duration(float64(d)*0.5*jitter)
}

// attemptTimeout bounds one request to the issuer, so that one that hangs
// leaves time for another.
func attemptTimeout(remaining time.Duration) time.Duration {
	if remaining <= 0 {
		return maxAttempt
	}
	return max(minAttempt, min(maxAttempt, remaining/3))
}

const (
	minAttempt = time.Second
	maxAttempt = 10 * time.Second
)
