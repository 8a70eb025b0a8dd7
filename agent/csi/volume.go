package csi

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	spec "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/signet-mesh/signet/internal/svidfiles"
)

// What a volume holds.
const (
	contentFiles  = "files"  // certificate, key and trust bundle
	contentSocket = "socket" // the Workload API's socket
)

// volume is what a pod has asked for, and who the pod is. It is immutable, and
// kept on the node while the volume is mounted.
type volume struct {
	ID        string `json:"id"`
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	UID       string `json:"uid"`     // of the pod
	Account   string `json:"account"` // its service account
	Target    string `json:"target"`  // where kubelet wants it
	Content   string `json:"content"`
	// Of files: their names, and the key's owner and mode.
	Certificate string          `json:"certificate"`
	Key         string          `json:"key"`
	Bundle      string          `json:"bundle"`
	Owner       svidfiles.Owner `json:"owner"`
	Mode        fs.FileMode     `json:"mode"`
	// Who is told of new files: processes of the pod that run this program.
	Signal  string `json:"signal,omitempty"`
	Program string `json:"program,omitempty"`
}

// files are the volume's, in a directory.
func (v *volume) files(dir string) *svidfiles.Files {
	return &svidfiles.Files{Dir: dir, Certificate: v.Certificate, Key: v.Key, Bundle: v.Bundle, KeyMode: v.Mode, KeyOwner: &v.Owner}
}

// Attributes of a volume, as pods write them into volumeAttributes.
const (
	attrContent = "signet.dev/content"
	attrUID     = "signet.dev/uid"
	attrMode    = "signet.dev/key-mode"
	attrCert    = "signet.dev/cert-file"
	attrKey     = "signet.dev/key-file"
	attrBundle  = "signet.dev/bundle-file"
	attrSignal  = "signet.dev/signal"
	attrProgram = "signet.dev/signal-program"
)

// What kubelet adds to them, over whatever a pod has written there: who the pod is.
const (
	kubeletPrefix    = "csi.storage.k8s.io/"
	kubeletUID       = kubeletPrefix + "pod.uid"
	kubeletName      = kubeletPrefix + "pod.name"
	kubeletNamespace = kubeletPrefix + "pod.namespace"
	kubeletAccount   = kubeletPrefix + "serviceAccount.name"
	kubeletEphemeral = kubeletPrefix + "ephemeral"
)

var (
	volumeID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$`)
	podUID   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,62}$`)
	label    = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	podName  = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// parse reads what kubelet asks for. Who the pod is comes from kubelet twice, in
// the path and beside the attributes, and must agree.
func parse(req *spec.NodePublishVolumeRequest, pods string) (*volume, error) {
	at := req.GetVolumeContext()
	v := &volume{
		ID: req.GetVolumeId(), Target: req.GetTargetPath(),
		UID: at[kubeletUID], Pod: at[kubeletName], Namespace: at[kubeletNamespace], Account: at[kubeletAccount],
	}
	t, err := parseTarget(pods, v.Target)
	switch {
	case err != nil:
		return nil, err
	case !volumeID.MatchString(v.ID):
		return nil, fmt.Errorf("volume_id %q is none of kubelet's", v.ID)
	case at[kubeletEphemeral] != "true":
		return nil, fmt.Errorf("%s is for inline volumes of pods only: write it as `csi` below the pod's `volumes`, without a PersistentVolume", Name)
	case !podUID.MatchString(v.UID) || !podName.MatchString(v.Pod) || !label.MatchString(v.Namespace) || !podName.MatchString(v.Account):
		return nil, fmt.Errorf("kubelet does not say which pod it is for (uid %q, %q/%q, service account %q): the CSIDriver %s needs podInfoOnMount: true", v.UID, v.Namespace, v.Pod, v.Account, Name)
	case v.UID != t.uid:
		return nil, fmt.Errorf("target_path %s is of pod %s, and the volume of pod %s", v.Target, t.uid, v.UID)
	case req.GetVolumeCapability().GetMount() == nil:
		return nil, errors.New("a block device was asked for; the volume is a folder")
	case !req.GetReadonly():
		return nil, fmt.Errorf("volume %q: write readOnly: true beside driver: %s; the files are written by the node's agent alone", t.name, Name)
	case len(req.GetSecrets()) > 0:
		return nil, fmt.Errorf("volume %q: nodePublishSecretRef is not used; remove it", t.name)
	}
	if err := v.attributes(at, req.GetVolumeCapability().GetMount().GetVolumeMountGroup()); err != nil {
		return nil, fmt.Errorf("volume %q: volumeAttributes: %w", t.name, err)
	}
	return v, nil
}

// attributes reads what the pod's author wrote. fsGroup is the pod's.
func (v *volume) attributes(at map[string]string, fsGroup string) error {
	v.Content = contentFiles
	if c, ok := at[attrContent]; ok {
		v.Content = c
	}
	known := []string{attrContent}
	switch v.Content {
	case contentFiles:
		known = append(known, attrUID, attrMode, attrCert, attrKey, attrBundle, attrSignal, attrProgram)
	case contentSocket:
	default:
		return fmt.Errorf("%s: %q is neither %s nor %s", attrContent, v.Content, contentFiles, contentSocket)
	}
	for _, key := range slices.Sorted(maps.Keys(at)) {
		if !strings.HasPrefix(key, kubeletPrefix) && !slices.Contains(known, key) {
			return fmt.Errorf("%q is not known with content %s; there are %s", key, v.Content, strings.Join(known, ", "))
		}
	}
	if v.Content == contentSocket {
		return nil
	}
	set := func(to *string, key, otherwise string) {
		if *to = otherwise; at[key] != "" {
			*to = at[key]
		}
	}
	set(&v.Certificate, attrCert, svidfiles.DefaultCertificate)
	set(&v.Key, attrKey, svidfiles.DefaultKey)
	set(&v.Bundle, attrBundle, svidfiles.DefaultBundle)
	v.Mode = 0o400
	if fsGroup != "" {
		gid, err := number(fsGroup)
		if err != nil {
			return fmt.Errorf("fsGroup: %w", err)
		}
		v.Owner.GID, v.Mode = gid, 0o440
	}
	if text, ok := at[attrUID]; ok {
		uid, err := number(text)
		if err != nil {
			return fmt.Errorf("%s: %w", attrUID, err)
		}
		v.Owner.UID = uid
	}
	switch text := at[attrMode]; text {
	case "":
	case "0400":
		v.Mode = 0o400
	case "0440":
		v.Mode = 0o440
	default:
		return fmt.Errorf("%s: %q is neither 0400 nor 0440: a key is read by its owner, or its group, and by nobody else", attrMode, text)
	}
	v.Signal, v.Program = at[attrSignal], at[attrProgram]
	if err := checkSignal(v.Signal, v.Program); err != nil {
		return err
	}
	return v.files("/nonexistent").Check()
}

func checkSignal(name, program string) error {
	switch {
	case name == "" && program == "":
	case name == "" || program == "":
		return fmt.Errorf("%s and %s belong together", attrSignal, attrProgram)
	case signals[name] == 0:
		return fmt.Errorf("%s: %q is not one of %s", attrSignal, name, strings.Join(slices.Sorted(maps.Keys(signals)), ", "))
	case !filepath.IsAbs(program) || filepath.Clean(program) != program || len(program) > 1024:
		return fmt.Errorf("%s: %q is no absolute path of a program, such as /usr/sbin/nginx", attrProgram, program)
	}
	return nil
}

func number(text string) (uint32, error) {
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil || n == math.MaxUint32 {
		return 0, fmt.Errorf("%q is no number of a user or group", text)
	}
	return uint32(n), nil
}
