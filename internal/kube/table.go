package kube

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// sum is the hash of one row.
type sum [16]byte

// table is a sorted list whose values are replaced whole by every apply, so
// that who was given them may keep them. An apply costs a copy and the work
// for the rows that change.
type table[T any] struct {
	keys   []string
	sums   []sum
	values []T
}

// rowKey sorts by namespace, then name: a zero byte is less than any other.
func rowKey(namespace, name string) string { return namespace + "\x00" + name }

// apply sets and, where the value is nil, removes rows. It reports whether
// anything changed.
func (t *table[T]) apply(changes map[string]*T) bool {
	keys := make([]string, 0, len(changes))
	sums := make(map[string]sum, len(changes))
	for key, value := range changes {
		i, found := slices.BinarySearch(t.keys, key)
		if value == nil {
			if found {
				keys = append(keys, key)
			}
			continue
		}
		s := sumOf(key, value)
		if found && t.sums[i] == s {
			continue
		}
		keys, sums[key] = append(keys, key), s
	}
	if len(keys) == 0 {
		return false
	}
	slices.SortFunc(keys, strings.Compare)
	size := len(t.keys) + len(keys)
	next := table[T]{make([]string, 0, size), make([]sum, 0, size), make([]T, 0, size)}
	from := 0
	for _, key := range keys {
		at, found := slices.BinarySearch(t.keys[from:], key)
		at += from
		next.keys = append(next.keys, t.keys[from:at]...)
		next.sums = append(next.sums, t.sums[from:at]...)
		next.values = append(next.values, t.values[from:at]...)
		if from = at; found {
			from++
		}
		if value := changes[key]; value != nil {
			next.keys, next.sums, next.values = append(next.keys, key), append(next.sums, sums[key]), append(next.values, *value)
		}
	}
	next.keys = append(next.keys, t.keys[from:]...)
	next.sums = append(next.sums, t.sums[from:]...)
	next.values = append(next.values, t.values[from:]...)
	*t = next
	return true
}

// get returns a row's value.
func (t *table[T]) get(key string) (value *T, ok bool) {
	i, found := slices.BinarySearch(t.keys, key)
	if !found {
		return nil, false
	}
	return &t.values[i], true
}

// sumOf hashes plain data; nothing in it can fail to be encoded.
func sumOf(key string, value any) sum {
	data, err := json.Marshal(value)
	if err != nil {
		panic(fmt.Sprintf("kube: encode %q: %v", key, err))
	}
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", key)
	h.Write(data)
	return sum(h.Sum(nil)[:16])
}
