package kube

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Timing of events.
const (
	eventAfter = 3 * time.Second  // a problem that ends by itself is none
	eventAgain = 10 * time.Minute // the same one of the same pod
)

// eventWriter tells a pod's owner why it is not in the mesh, and who looks
// after a node what is wrong with it. One goroutine uses it.
type eventWriter struct {
	client  *Client
	log     *slog.Logger
	limiter *rate.Limiter
	seen    map[string]*sighting // by the object's UID and the reason
}

// sighting is a problem that lasts.
type sighting struct {
	text  string
	since time.Time
	told  time.Time // zero: not yet
}

func newEventWriter(client *Client, log *slog.Logger) eventWriter {
	return eventWriter{client: client, log: log, limiter: rate.NewLimiter(2, 20), seen: map[string]*sighting{}}
}

// write takes the problems that there are now.
func (e *eventWriter) write(ctx context.Context, problems []problem, now time.Time) {
	there := set{}
	for _, p := range problems {
		key := p.uid + " " + p.reason
		there.add(key)
		s := e.seen[key]
		if s == nil || s.text != p.text {
			s = &sighting{text: p.text, since: now}
			e.seen[key] = s
		}
		if now.Sub(s.since) < eventAfter || !s.told.IsZero() && now.Sub(s.told) < eventAgain || !e.limiter.AllowN(now, 1) {
			continue
		}
		s.told = now
		at := metav1.NewTime(now)
		of := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.namespace, Name: p.name, UID: types.UID(p.uid)}
		namespace, message := p.namespace, short(p.text)
		if p.reason == notEnrolled {
			message = "not in the mesh: " + message
		}
		if p.name == "" { // as kubelet does it for nodes
			of = corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: p.node, UID: types.UID(p.node)}
			namespace = metav1.NamespaceDefault
		}
		_, err := e.client.Core.CoreV1().Events(namespace).Create(ctx, &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{Name: fmt.Sprintf("%s.%x", of.Name, now.UnixNano()), Namespace: namespace},
			InvolvedObject: of,
			Reason:         p.reason,
			Message:        message,
			Type:           corev1.EventTypeWarning,
			Source:         corev1.EventSource{Component: fieldManager, Host: p.node},
			FirstTimestamp: at, LastTimestamp: at, Count: 1,
		}, metav1.CreateOptions{})
		if err != nil && ctx.Err() == nil {
			e.log.WarnContext(ctx, "an event could not be written", "object", of.Kind+" "+namespace+"/"+of.Name, "error", err)
		}
	}
	for key := range e.seen {
		if _, ok := there[key]; !ok {
			delete(e.seen, key)
		}
	}
}

// short fits the API's bound on an event's message, 1,024 bytes.
func short(s string) string {
	const most = 900
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + " ..."
	}
	return s
}
