package main

import (
	"database/sql"
	"encoding/json"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
)

// shop answers HTTP.
type shop struct {
	cart redis
	db   *sql.DB
	log  *slog.Logger
}

func (s *shop) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("GET /api/cart", s.showCart)
	mux.HandleFunc("POST /api/cart/{item}", s.addToCart)
	mux.HandleFunc("GET /api/orders", s.showOrders)
	mux.HandleFunc("POST /api/orders", s.order)
	return mux
}

// cartKey is the list that is the cart: the example has one customer.
const cartKey = "cart"

type cart struct {
	Items []string `json:"items"`
}

type order struct {
	ID    int64  `json:"id"`
	Items string `json:"items"`
}

var itemName = regexp.MustCompile(`^[a-z]{1,32}$`)

func (s *shop) showCart(w http.ResponseWriter, r *http.Request) {
	items, err := s.cart.list(r.Context(), "LRANGE", cartKey, "0", "-1")
	s.answer(w, r, cart{items}, err)
}

func (s *shop) addToCart(w http.ResponseWriter, r *http.Request) {
	item := r.PathValue("item")
	if !itemName.MatchString(item) {
		http.Error(w, "an item is a word of lower-case letters", http.StatusBadRequest)
		return
	}
	if _, err := s.cart.list(r.Context(), "RPUSH", cartKey, item); err != nil {
		s.answer(w, r, nil, err)
		return
	}
	s.showCart(w, r)
}

func (s *shop) showOrders(w http.ResponseWriter, r *http.Request) {
	orders := []order{}
	rows, err := s.db.QueryContext(r.Context(), `SELECT id, items FROM orders ORDER BY id DESC LIMIT 10`)
	if err != nil {
		s.answer(w, r, nil, err)
		return
	}
	defer rows.Close()
	for rows.Next() {
		var o order
		if err := rows.Scan(&o.ID, &o.Items); err != nil {
			s.answer(w, r, nil, err)
			return
		}
		orders = append(orders, o)
	}
	s.answer(w, r, orders, rows.Err())
}

// order moves the cart into an order.
func (s *shop) order(w http.ResponseWriter, r *http.Request) {
	items, err := s.cart.list(r.Context(), "LRANGE", cartKey, "0", "-1")
	if err != nil {
		s.answer(w, r, nil, err)
		return
	}
	if len(items) == 0 {
		http.Error(w, "the cart is empty", http.StatusConflict)
		return
	}
	o := order{Items: strings.Join(items, ", ")}
	if err = s.db.QueryRowContext(r.Context(), `INSERT INTO orders (items) VALUES ($1) RETURNING id`, o.Items).Scan(&o.ID); err == nil {
		_, err = s.cart.list(r.Context(), "DEL", cartKey)
	}
	s.answer(w, r, o, err)
}

func (s *shop) answer(w http.ResponseWriter, r *http.Request, v any, err error) {
	if err != nil {
		s.log.WarnContext(r.Context(), "no answer", "path", r.URL.Path, "error", err)
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}
