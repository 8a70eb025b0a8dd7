package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	v1 "github.com/signet-mesh/signet/api/cni/v1"
)

// An agent that is being replaced is away for a moment: it is dialled again
// for this long before kubelet is told, which would throw the sandbox away.
const (
	absence = 5 * time.Second
	again   = 100 * time.Millisecond
)

// ask asks the agent, again while it is away, until it answers or ctx ends.
func ask(ctx context.Context, socket, path string, p v1.Pod) (v1.Result, error) {
	give, cancel := context.WithTimeout(ctx, absence)
	defer cancel()
	for {
		r, err := askOnce(ctx, socket, path, p)
		if err == nil || refused(err) {
			return r, err
		}
		select {
		case <-give.Done():
			return "", away(socket, err)
		case <-time.After(again):
		}
	}
}

// askOnce asks the agent. Every answer but an understood result is an error.
func askOnce(ctx context.Context, socket, path string, p v1.Pod) (v1.Result, error) {
	body, err := json.Marshal(p)
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var a v1.Answer
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&a); err != nil {
		return "", fmt.Errorf("answer with status %s: %w", resp.Status, err)
	}
	if a.Error != "" {
		return "", errAnswer{a.Error}
	}
	ok := resp.StatusCode == http.StatusOK
	switch path {
	case v1.PathAdd, v1.PathCheck:
		ok = ok && (a.Result == v1.Captured || a.Result == v1.NotEnrolled || a.Result == v1.Excluded)
	case v1.PathDel:
		ok = ok && a.Result == v1.Released
	}
	if !ok {
		return "", errAnswer{fmt.Sprintf("the agent answered %q with status %s, which signet-cni does not understand; both must be of one release", a.Result, resp.Status)}
	}
	return a.Result, nil
}

var errUsage = errors.New("usage: signet-cni install|remove [flags]; without arguments it is a CNI plugin, to be called by a container runtime")
