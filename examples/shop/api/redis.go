package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// redis speaks as much of Redis' protocol as a cart needs.
type redis struct{ address string }

// maxReply bounds the parts of an answer, and the bytes of each.
const maxReply = 1 << 16

// list runs one command on a connection of its own, and returns the answer's
// parts: those of a list, or the one that it is.
func (r redis) list(ctx context.Context, command ...string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", r.address)
	if err != nil {
		return nil, fmt.Errorf("cart: %w", err)
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(deadline)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(command))
	for _, word := range command {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(word), word)
	}
	if _, err = io.WriteString(c, b.String()); err == nil {
		var reply []string
		if reply, err = readReply(bufio.NewReader(c)); err == nil {
			return reply, nil
		}
	}
	return nil, fmt.Errorf("cart: %w", err)
}

func readReply(in *bufio.Reader) ([]string, error) {
	line, err := in.ReadString('\n')
	if err != nil {
		return nil, err
	}
	line = strings.TrimSuffix(line, "\r\n")
	if line == "" {
		return nil, errors.New("an empty answer")
	}
	kind, text := line[0], line[1:]
	switch kind {
	case '+', ':':
		return []string{text}, nil
	case '-':
		return nil, errors.New(text)
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > maxReply {
		return nil, fmt.Errorf("an answer of %q parts or bytes", text)
	}
	switch kind {
	case '$':
		word := make([]byte, n+2)
		if _, err := io.ReadFull(in, word); err != nil {
			return nil, err
		}
		return []string{string(word[:n])}, nil
	case '*':
		all := []string{}
		for range n {
			if next, err := in.Peek(1); err != nil || next[0] == '*' {
				return nil, errors.Join(err, errors.New("a list in a list"))
			}
			part, err := readReply(in)
			if err != nil {
				return nil, err
			}
			all = append(all, part...)
		}
		return all, nil
	}
	return nil, fmt.Errorf("an answer of the kind %q", kind)
}
