package kube

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/ca/caserver"
)

// Names that the release has in every cluster.
const (
	agentServiceAccount = "signet-agent"
	joinAudience        = "signet-control"
	joinsConfigMap      = "signet-joins"
)

// Keys in what a TokenReview says of a token that is bound to a pod.
const (
	extraPodName    = "authentication.kubernetes.io/pod-name"
	extraPodUID     = "authentication.kubernetes.io/pod-uid"
	extraNodeName   = "authentication.kubernetes.io/node-name"
	extraCredential = "authentication.kubernetes.io/credential-id"
)

const (
	maxJoinToken = 16 << 10         // bytes
	joinSkew     = 10 * time.Minute // a spent token is remembered this much longer than it is valid
	joinTries    = 20               // to write the record, when others write too
	maxSpent     = 8000             // records; an object of the API server holds a megabyte
)

// Joiner lets the agent's pods join as the nodes that they run on, each by the
// service account token that the kubelet gave it. It implements
// caserver.Joiner and is safe for concurrent use, also by several replicas.
type Joiner struct {
	client    *Client
	namespace string
	limiter   *rate.Limiter // of reviews: anybody may ask for one
	now       func() time.Time
}

// NewJoiner returns a Joiner for a release in a namespace.
func NewJoiner(client *Client, namespace string) *Joiner {
	return &Joiner{client: client, namespace: namespace, limiter: rate.NewLimiter(50, 200), now: time.Now}
}

// refused wraps caserver.ErrToken with a reason for the log.
func refused(format string, args ...any) error {
	return fmt.Errorf("%w: %s", caserver.ErrToken, fmt.Sprintf(format, args...))
}

// Redeem implements caserver.Joiner. The token must be for the audience
// signet-control, of the service account signet-agent of the release's
// namespace, and bound to a pod that exists and runs on the node that the token
// names; which node, only the API server says. It is spent when Redeem
// returns.
func (j *Joiner) Redeem(ctx context.Context, token string) (string, error) {
	expires, ok := expiry(token)
	if !ok {
		return "", refused("it is not a service account token")
	}
	if !j.limiter.Allow() {
		return "", errors.New("kube: too many nodes join at once; try again")
	}
	review, err := j.client.Core.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{joinAudience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("kube: review a join token: %w", err)
	}
	status := review.Status
	if !status.Authenticated {
		return "", refused("the API server does not accept it: %s", status.Error)
	}
	// An API server that knows no audiences leaves them out.
	if !slices.Contains(status.Audiences, joinAudience) {
		return "", refused("its audience is %q, not %s", status.Audiences, joinAudience)
	}
	if want := "system:serviceaccount:" + j.namespace + ":" + agentServiceAccount; status.User.Username != want {
		return "", refused("it is of %q, not of %s", status.User.Username, want)
	}
	var facts [4]string
	for i, key := range []string{extraPodName, extraPodUID, extraNodeName, extraCredential} {
		values := status.User.Extra[key]
		if len(values) != 1 || values[0] == "" {
			return "", refused("the API server does not say its %s; a token bound to a pod, of Kubernetes 1.32 or later, is needed", key)
		}
		facts[i] = values[0]
	}
	podName, podUID, node, credential := facts[0], facts[1], facts[2], facts[3]
	if err := j.checkPod(ctx, podName, podUID, node); err != nil {
		return "", err
	}
	if err := j.spend(ctx, credential, expires); err != nil {
		return "", err
	}
	return node, nil
}

// checkPod asks the API server itself: a cache may be behind.
func (j *Joiner) checkPod(ctx context.Context, name, uid, node string) error {
	p, err := j.client.Core.CoreV1().Pods(j.namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return refused("its pod %s does not exist", name)
	case err != nil:
		return fmt.Errorf("kube: look up the pod of a join token: %w", err)
	case string(p.UID) != uid:
		return refused("its pod %s is another one now", name)
	case p.Spec.ServiceAccountName != agentServiceAccount:
		return refused("its pod %s runs as %s", name, p.Spec.ServiceAccountName)
	case p.Spec.NodeName == "" || p.Spec.NodeName != node:
		return refused("its pod %s runs on node %q, the token is bound to %q", name, p.Spec.NodeName, node)
	case p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed:
		return refused("its pod %s is over", name)
	}
	return nil
}

// spend records a credential as used. Of any number of callers one succeeds:
// the API server takes a write only from who has read the newest record.
func (j *Joiner) spend(ctx context.Context, credential string, expires time.Time) error {
	digest := sha256.Sum256([]byte(credential))
	key := hex.EncodeToString(digest[:])
	records := j.client.Core.CoreV1().ConfigMaps(j.namespace)
	for range joinTries {
		record, err := records.Get(ctx, joinsConfigMap, metav1.GetOptions{})
		missing := apierrors.IsNotFound(err)
		if err != nil && !missing {
			return fmt.Errorf("kube: read ConfigMap %s: %w", joinsConfigMap, err)
		}
		if missing {
			record = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: joinsConfigMap, Namespace: j.namespace}}
		}
		if _, used := record.Data[key]; used {
			return refused("it was used before")
		}
		data := map[string]string{}
		maps.Copy(data, record.Data)
		maps.DeleteFunc(data, func(_, until string) bool {
			t, err := time.Parse(time.RFC3339, until)
			return err == nil && j.now().After(t) // what cannot be read stays
		})
		if len(data) >= maxSpent {
			return fmt.Errorf("kube: ConfigMap %s holds %d join tokens that are still valid; shorten the lifetime of the agents' tokens", joinsConfigMap, len(data))
		}
		data[key] = expires.Add(joinSkew).UTC().Format(time.RFC3339)
		record.Data = data
		if missing {
			_, err = records.Create(ctx, record, metav1.CreateOptions{})
		} else {
			_, err = records.Update(ctx, record, metav1.UpdateOptions{})
		}
		switch {
		case err == nil:
			return nil
		case !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) && !apierrors.IsNotFound(err):
			return fmt.Errorf("kube: write ConfigMap %s: %w", joinsConfigMap, err)
		}
	}
	return fmt.Errorf("kube: write ConfigMap %s: others wrote it %d times meanwhile; try again", joinsConfigMap, joinTries)
}

// expiry reads when a token ends. Nothing in the token is believed before the
// API server has reviewed it; this is only used after.
func expiry(token string) (time.Time, bool) {
	parts := strings.Split(token, ".")
	if len(token) > maxJoinToken || len(parts) != 3 {
		return time.Time{}, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return time.Time{}, false
	}
	var claims struct {
		Expires int64 `json:"exp"`
	}
	if json.Unmarshal(payload, &claims) != nil || claims.Expires <= 0 {
		return time.Time{}, false
	}
	return time.Unix(claims.Expires, 0), true
}
