package kube

import (
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/signet-mesh/signet/ca/caserver"
)

// What an API server may say of a token and does not say of a good one: older
// servers leave things out, and a token may be of a pod that the node's name
// in it does not fit.
func TestJoinBelievesNoHalfReview(t *testing.T) {
	good := func() *authenticationv1.TokenReviewStatus {
		return &authenticationv1.TokenReviewStatus{
			Authenticated: true, Audiences: []string{joinAudience},
			User: authenticationv1.UserInfo{
				Username: "system:serviceaccount:" + release + ":signet-agent",
				Extra: map[string]authenticationv1.ExtraValue{
					extraPodName: {"agent"}, extraPodUID: {"u1"}, extraNodeName: {"one"}, extraCredential: {"JTI=1"},
				},
			},
		}
	}
	extra := func(key string, values ...string) func(*authenticationv1.TokenReviewStatus) {
		return func(s *authenticationv1.TokenReviewStatus) {
			s.User.Extra = maps.Clone(s.User.Extra)
			if s.User.Extra[key] = values; len(values) == 0 {
				delete(s.User.Extra, key)
			}
		}
	}
	agent := func(edit ...func(*corev1.Pod)) *corev1.Pod {
		return podOf(release, "agent", "u1", "192.168.0.1", append([]func(*corev1.Pod){func(p *corev1.Pod) { p.Spec.ServiceAccountName = "signet-agent" }}, edit...)...)
	}
	payload := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp":%d}`, time.Now().Add(time.Hour).Unix()))
	token := "h." + payload + ".s"
	for name, test := range map[string]struct {
		edit func(*authenticationv1.TokenReviewStatus)
		pod  *corev1.Pod
		ok   bool
	}{
		"good":                    {pod: agent(), ok: true},
		"not authenticated":       {edit: func(s *authenticationv1.TokenReviewStatus) { s.Authenticated = false }, pod: agent()},
		"no audience":             {edit: func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }, pod: agent()},
		"user of the same name":   {edit: func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "signet-agent" }, pod: agent()},
		"no node":                 {edit: extra(extraNodeName), pod: agent()},
		"two nodes":               {edit: extra(extraNodeName, "one", "two"), pod: agent()},
		"empty node":              {edit: extra(extraNodeName, ""), pod: agent()},
		"another node":            {edit: extra(extraNodeName, "two"), pod: agent()},
		"no pod name":             {edit: extra(extraPodName), pod: agent()},
		"no pod UID":              {edit: extra(extraPodUID), pod: agent()},
		"another UID":             {edit: extra(extraPodUID, "u2"), pod: agent()},
		"no credential":           {edit: extra(extraCredential), pod: agent()},
		"no such pod":             {},
		"pod of another account":  {pod: agent(func(p *corev1.Pod) { p.Spec.ServiceAccountName = "web" })},
		"pod on no node":          {pod: agent(func(p *corev1.Pod) { p.Spec.NodeName = "" })},
		"pod that is over":        {pod: agent(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })},
		"pod in another release":  {pod: agent(func(p *corev1.Pod) { p.Namespace = "elsewhere" })},
		"pod moved, node in both": {edit: extra(extraNodeName, "two"), pod: agent(func(p *corev1.Pod) { p.Spec.NodeName = "three" })},
	} {
		t.Run(name, func(t *testing.T) {
			core := fake.NewClientset()
			if test.pod != nil {
				if err := core.Tracker().Add(test.pod); err != nil {
					t.Fatal(err)
				}
			}
			status := good()
			if test.edit != nil {
				test.edit(status)
			}
			core.PrependReactor("create", "tokenreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
				asked := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenReview)
				if strings.Join(asked.Spec.Audiences, " ") != joinAudience {
					t.Errorf("asked for audiences %q", asked.Spec.Audiences)
				}
				return true, &authenticationv1.TokenReview{Status: *status}, nil
			})
			j := NewJoiner(&Client{Core: core}, release)
			switch node, err := j.Redeem(t.Context(), token); {
			case test.ok && (err != nil || node != "one"):
				t.Errorf("%q, %v", node, err)
			case !test.ok && !errors.Is(err, caserver.ErrToken):
				t.Errorf("%q, %v; want ErrToken", node, err)
			}
			if _, err := j.Redeem(t.Context(), token); test.ok && !errors.Is(err, caserver.ErrToken) {
				t.Errorf("again: %v", err)
			}
		})
	}
}

// When the API server cannot say, nobody joins, and the token is not called
// bad.
func TestJoinFailsClosed(t *testing.T) {
	payload := base64.RawURLEncoding.EncodeToString([]byte(`{"exp":9999999999}`))
	core := fake.NewClientset()
	core.PrependReactor("create", "tokenreviews", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("down")
	})
	j := NewJoiner(&Client{Core: core}, release)
	if node, err := j.Redeem(t.Context(), "h."+payload+".s"); err == nil || errors.Is(err, caserver.ErrToken) || node != "" {
		t.Errorf("%q, %v", node, err)
	}
}
