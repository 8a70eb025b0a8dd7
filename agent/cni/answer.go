package cni

import (
	"context"
	"errors"
	"fmt"
	"time"

	v1 "github.com/signet-mesh/signet/api/cni/v1"
)

// errUnknown is why a pod waits that the agent has not heard of.
var errUnknown = errors.New("the agent does not know this pod yet, so it does not start outside of the mesh; the pod waits and is tried again (does signet-control run, and does this node reach it? see `signet status`)")

// add answers when the pod may start, or, after the wait, why it may not yet.
func (s *Server) add(ctx context.Context, p v1.Pod) (v1.Result, error) {
	if s.own(p) {
		return v1.Excluded, nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Wait)
	defer cancel()
	for {
		err := errUnknown
		switch s.agent.Enrolment(p.Namespace, p.Name, p.UID) {
		case NotEnrolled:
			return v1.NotEnrolled, nil
		case Excluded:
			return v1.Excluded, nil
		case Enrolled:
			if err = s.agent.Hold(ctx, p.UID, p.NetNS); err == nil {
				return v1.Captured, nil
			}
			err = fmt.Errorf("the pod cannot be captured yet: %w; it waits and is tried again (see the log of signet-agent and signet-proxy on this node)", err)
		}
		select {
		case <-ctx.Done():
			return "", err
		case <-time.After(s.cfg.Poll):
		}
	}
}

// check asks once: the runtime wants to know what is, not what could be.
func (s *Server) check(ctx context.Context, p v1.Pod) (v1.Result, error) {
	if s.own(p) {
		return v1.Excluded, nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Wait)
	defer cancel()
	switch s.agent.Enrolment(p.Namespace, p.Name, p.UID) {
	case NotEnrolled:
		return v1.NotEnrolled, nil
	case Excluded:
		return v1.Excluded, nil
	case Enrolled:
		if err := s.agent.Check(ctx, p.UID, p.NetNS); err != nil {
			return "", fmt.Errorf("the pod is not captured: %w; the agent repairs it (see the log of signet-agent on this node)", err)
		}
		return v1.Captured, nil
	}
	return "", errUnknown
}

// del passes on that a sandbox goes. Whether the pod was ever enrolled is the
// agent's to know.
func (s *Server) del(ctx context.Context, p v1.Pod) (v1.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Wait)
	defer cancel()
	if err := s.agent.Release(ctx, p.UID, p.NetNS); err != nil {
		return "", fmt.Errorf("the pod cannot be released: %w; the agent will do so when the pod is gone from the API server", err)
	}
	return v1.Released, nil
}

func (s *Server) own(p v1.Pod) bool {
	return s.cfg.OwnNamespace != "" && p.Namespace == s.cfg.OwnNamespace
}
