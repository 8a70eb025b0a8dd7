package manifest

import (
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

const kindNamespace = "Namespace"

// metadata is the part of a document's metadata that has a meaning here.
type metadata struct {
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace"`
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`
}

// document is one decoded document and the places of its fields.
type document struct {
	report *report
	file   string
	line   int
	lines  map[string]int // field path -> line
	faults []string       // field paths with a finding from decoding

	kind string
	meta metadata
	spec any // pointer to the kind's spec; nil for a Namespace
}

// key returns "namespace/name".
func (d *document) key() string { return d.meta.Namespace + "/" + d.meta.Name }

// fault records a finding at a field. A field that could not be decoded is
// reported once: what else would be said of it follows from that.
func (d *document) fault(code, field, format string, args ...any) {
	for _, known := range d.faults {
		if within(field, known) || within(known, field) {
			return
		}
	}
	d.add(code, field, d.lineOf(field), fmt.Sprintf(format, args...))
}

func (d *document) add(code, field string, line int, message string) {
	d.report.add(Finding{File: d.file, Line: line, Field: field, Code: code, Message: message})
}

// within reports whether field is parent itself or lies below it.
func within(field, parent string) bool {
	rest, ok := strings.CutPrefix(field, parent)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
}

// lineOf returns the line of a field, or of the nearest field around it that
// the document has.
func (d *document) lineOf(field string) int {
	for field != "" {
		if line, ok := d.lines[field]; ok {
			return line
		}
		field = field[:max(strings.LastIndexAny(field, ".["), 0)]
	}
	return d.line
}

// decode reads one document; nil if its kind cannot be told.
func decode(r *report, file string, n *yaml.Node) *document {
	d := &document{report: r, file: file, line: n.Line, lines: map[string]int{}}
	if line, message := forbidden(n, 0); message != "" {
		d.add(CodeForbidden, "", line, message)
		return nil
	}
	if n.Kind != yaml.MappingNode {
		d.add(CodeType, "", n.Line, "a document must be a mapping with apiVersion, kind and metadata")
		return nil
	}
	var head struct {
		APIVersion string    `json:"apiVersion"`
		Kind       string    `json:"kind"`
		Metadata   yaml.Node `json:"metadata"`
		Spec       yaml.Node `json:"spec"`
	}
	d.value(n, reflect.ValueOf(&head).Elem(), "")
	d.kind = head.Kind
	version := v1alpha1.GroupVersion
	switch d.kind {
	case kindNamespace:
		version = "v1"
	case v1alpha1.KindMeshConfig:
		d.spec = &v1alpha1.MeshConfigSpec{}
	case v1alpha1.KindWorkloadEntry:
		d.spec = &v1alpha1.WorkloadEntrySpec{}
	case v1alpha1.KindServiceEntry:
		d.spec = &v1alpha1.ServiceEntrySpec{}
	case v1alpha1.KindAllowPolicy:
		d.spec = &v1alpha1.AllowPolicySpec{}
	case v1alpha1.KindQuarantine:
		d.spec = &v1alpha1.QuarantineSpec{}
	case v1alpha1.KindFederation:
		d.spec = &v1alpha1.FederationSpec{}
	case "":
		d.fault(CodeKind, "kind", "is missing; use Namespace, MeshConfig, WorkloadEntry, ServiceEntry, AllowPolicy, Quarantine or Federation")
		return nil
	default:
		d.fault(CodeKind, "kind", "%q is not known; use Namespace, MeshConfig, WorkloadEntry, ServiceEntry, AllowPolicy, Quarantine or Federation", d.kind)
		return nil
	}
	if head.APIVersion != version {
		d.fault(CodeKind, "apiVersion", "is %q; %s needs %s", head.APIVersion, d.kind, version)
	}
	if !head.Metadata.IsZero() {
		d.value(&head.Metadata, reflect.ValueOf(&d.meta).Elem(), "metadata")
	}
	switch {
	case head.Spec.IsZero() && d.spec != nil:
		d.fault(CodeRequired, "spec", "is missing")
		d.faults = append(d.faults, "spec")
	case !head.Spec.IsZero() && d.spec == nil:
		d.fault(CodeUnknown, "spec", "a Namespace has no spec here; only metadata is read")
	case d.spec != nil:
		d.value(&head.Spec, reflect.ValueOf(d.spec).Elem(), "spec")
	}
	return d
}

var (
	typeNode     = reflect.TypeFor[yaml.Node]()
	typeDuration = reflect.TypeFor[metav1.Duration]()
	typeTime     = reflect.TypeFor[metav1.Time]()
	decimal      = regexp.MustCompile(`^(0|-?[1-9][0-9]{0,18})$`)
	plainKey     = regexp.MustCompile(`^[A-Za-z0-9_./-]{1,80}$`)
)

// bad records a field that cannot be decoded.
func (d *document) bad(code, field string, n *yaml.Node, format string, args ...any) {
	if len(d.faults) < maxFindings { // beyond that the report is full too
		d.faults = append(d.faults, field)
	}
	d.add(code, field, n.Line, fmt.Sprintf(format, args...))
}

// value decodes n into v, which has one of the types of the schema.
func (d *document) value(n *yaml.Node, v reflect.Value, field string) {
	if field != "" {
		if _, ok := d.lines[field]; !ok {
			d.lines[field] = n.Line
		}
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" {
		d.bad(CodeType, field, n, "has no value; give it one or remove the key")
		return
	}
	switch {
	case v.Type() == typeNode:
		v.Set(reflect.ValueOf(*n))
	case v.Type() == typeDuration:
		d.duration(n, v, field)
	case v.Type() == typeTime:
		d.instant(n, v, field)
	case v.Kind() == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.value(n, v.Elem(), field)
	case v.Kind() == reflect.Struct:
		d.mapping(n, v, field)
	case v.Kind() == reflect.Map:
		d.textMap(n, v, field)
	case v.Kind() == reflect.Slice:
		d.sequence(n, v, field)
	case v.Kind() == reflect.String:
		d.text(n, v, field)
	default:
		d.number(n, v, field)
	}
}

// pairs visits the keys of a mapping, each once.
func (d *document) pairs(n *yaml.Node, field string, visit func(path, key string, keyNode, value *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		d.bad(CodeType, field, n, "must be a mapping, is %s", describe(n))
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode || k.ShortTag() != "!!str" {
			d.bad(CodeType, field, k, "has a key that is not text")
			continue
		}
		path := join(field, k.Value)
		if first, ok := seen[k.Value]; ok {
			d.bad(CodeDoubled, path, k, "is given twice, first on line %d; remove one", first)
			continue
		}
		seen[k.Value] = k.Line
		visit(path, k.Value, k, v)
	}
}

func join(field, key string) string {
	if !plainKey.MatchString(key) {
		key = strconv.Quote(key[:min(len(key), 80)])
	}
	if field == "" {
		return key
	}
	return field + "." + key
}

func (d *document) mapping(n *yaml.Node, v reflect.Value, field string) {
	names := fieldNames(v.Type())
	d.pairs(n, field, func(path, key string, k, value *yaml.Node) {
		i := slices.Index(names, key) // exact: spelling in another case is unknown
		if i < 0 {
			d.bad(CodeUnknown, path, k, "unknown field; known here: %s", strings.Join(names, ", "))
			return
		}
		d.lines[path] = k.Line
		d.value(value, v.Field(i), path)
	})
}

// fieldNames returns the names in the documents of a struct's fields.
func fieldNames(t reflect.Type) []string {
	names := make([]string, t.NumField())
	for i := range names {
		names[i], _, _ = strings.Cut(t.Field(i).Tag.Get("json"), ",")
	}
	return names
}

func (d *document) textMap(n *yaml.Node, v reflect.Value, field string) {
	out := map[string]string{}
	d.pairs(n, field, func(path, key string, k, value *yaml.Node) {
		d.lines[path] = k.Line
		if value.Kind != yaml.ScalarNode || value.ShortTag() != "!!str" {
			d.bad(CodeType, path, value, "must be text, is %s; put it in quotes", describe(value))
			return
		}
		out[key] = value.Value
	})
	v.Set(reflect.ValueOf(out))
}

func (d *document) sequence(n *yaml.Node, v reflect.Value, field string) {
	if n.Kind != yaml.SequenceNode {
		d.bad(CodeType, field, n, "must be a list, is %s", describe(n))
		return
	}
	if len(n.Content) > maxItems {
		d.bad(CodeValue, field, n, "has %d items, at most %d are allowed", len(n.Content), maxItems)
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, item := range n.Content {
		d.value(item, v.Index(i), fmt.Sprintf("%s[%d]", field, i))
	}
}

// text refuses empty text: an absent field often means "all", and text that a
// template left empty must not come to mean that.
func (d *document) text(n *yaml.Node, v reflect.Value, field string) {
	switch {
	case n.Kind != yaml.ScalarNode:
		d.bad(CodeType, field, n, "must be text, is %s", describe(n))
	case n.ShortTag() != "!!str":
		d.bad(CodeType, field, n, "must be text, is %s; put it in quotes", describe(n))
	case n.Value == "":
		d.bad(CodeType, field, n, "is empty; give it a value or remove the key")
	case strings.ContainsFunc(n.Value, unicode.IsControl):
		d.bad(CodeValue, field, n, "%q holds a control character", n.Value)
	default:
		v.SetString(n.Value)
	}
}

func (d *document) number(n *yaml.Node, v reflect.Value, field string) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || !decimal.MatchString(n.Value) {
		d.bad(CodeType, field, n, "must be a whole decimal number, is %s", describe(n))
		return
	}
	i, err := strconv.ParseInt(n.Value, 10, 64)
	if err != nil || v.OverflowInt(i) {
		d.bad(CodeValue, field, n, "%s is too large", n.Value)
		return
	}
	v.SetInt(i)
}

func (d *document) duration(n *yaml.Node, v reflect.Value, field string) {
	if n.Kind != yaml.ScalarNode {
		d.bad(CodeType, field, n, "must be a duration such as 1h or 30s, is %s", describe(n))
		return
	}
	t, err := time.ParseDuration(n.Value)
	if err != nil {
		d.bad(CodeType, field, n, "%q is no duration; write 1h or 30s", n.Value)
		return
	}
	v.Set(reflect.ValueOf(metav1.Duration{Duration: t}))
}

func (d *document) instant(n *yaml.Node, v reflect.Value, field string) {
	if n.Kind != yaml.ScalarNode {
		d.bad(CodeType, field, n, "must be an instant such as 2026-01-02T15:04:05Z, is %s", describe(n))
		return
	}
	t, err := time.Parse(time.RFC3339, n.Value)
	if err != nil {
		d.bad(CodeType, field, n, "%q is no instant; write one as 2026-01-02T15:04:05Z", n.Value)
		return
	}
	v.Set(reflect.ValueOf(metav1.NewTime(t)))
}

// describe names what a node is, for messages.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	kind := map[string]string{"!!int": "the number", "!!float": "the number", "!!bool": "the truth value", "!!timestamp": "the date"}[n.ShortTag()]
	if kind == "" {
		kind = "the text"
	}
	return kind + " " + strconv.Quote(n.Value)
}
