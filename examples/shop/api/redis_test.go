package main

import (
	"bufio"
	"slices"
	"strings"
	"testing"
)

// Defends the API from an answer that is no answer: whatever stands where Redis
// should be, it gets no say in memory or depth.
func TestReadReply(t *testing.T) {
	for _, c := range []struct {
		in   string
		want []string
		err  string
	}{
		{in: "+OK\r\n", want: []string{"OK"}},
		{in: ":3\r\n", want: []string{"3"}},
		{in: "$3\r\ntea\r\n", want: []string{"tea"}},
		{in: "*0\r\n", want: []string{}},
		{in: "*2\r\n$3\r\ntea\r\n$6\r\ncoffee\r\n", want: []string{"tea", "coffee"}},
		{in: "-ERR no\r\n", err: "ERR no"},
		{in: "", err: "EOF"},
		{in: "\r\n", err: "empty"},
		{in: "$-1\r\n", err: "bytes"},
		{in: "$99999999999\r\n", err: "bytes"},
		{in: "$9\r\ntea\r\n", err: "EOF"},
		{in: "*1\r\n*1\r\n+OK\r\n", err: "list in a list"},
		{in: "HTTP/1.1 400 Bad Request\r\n", err: "parts or bytes"},
	} {
		got, err := readReply(bufio.NewReader(strings.NewReader(c.in)))
		switch {
		case c.err == "" && (err != nil || !slices.Equal(got, c.want)):
			t.Errorf("%q: %q, %v", c.in, got, err)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%q: %q, %v; want an error with %q", c.in, got, err, c.err)
		}
	}
}
